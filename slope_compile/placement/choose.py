"""Which container each weight travels in for one backend, and why. The codes and the scales stay the same in every one.

| weight | TensorRT-RTX | TensorRT |
|---|---|---|
| conv, INT4 codes | `int4-storage` (held as INT4, dequantized at run time) | `int8-weight` |
| GEMM, INT4 codes | `int4-weight` | `int4-weight` in blocks of 64 or 128, else `int8-weight` |
| any, INT8 codes | `int8-weight` | `int8-weight` |
| any, beside a quantized activation | `sparse-int8` where 2:4, else `int8` | the same |
| any, 2-bit types | as INT4 codes | as INT4 codes |
| floats | `float` | `float` |
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.backends import Backend

GEMM = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Place:
    """What becomes of one weight.

    Args:
        container: ONNX's name of the type that the backend gets: `INT4`, `INT8`, `FLOAT`, …
        placement: `sparse-int8`, `int8`, `int4-storage`, `int4-weight`, `int8-weight` or `float`.
        reason: Why.
    """

    container: str
    placement: str
    reason: str


def place(weight: CodedWeight, backend: Backend, reads_int8: bool = False) -> Place:
    """Return the container of a weight for a backend.

    Args:
        weight: What the reader found.
        backend: Who takes it.
        reads_int8: Whether its operator reads a quantized activation: then both factors must be INT8.
    """
    if weight.codes is None:
        return Place(weight.dtype, "float", f"stored as {weight.dtype}: not compressed")
    if reads_int8 and weight.dtype in ("INT2", "INT4", "INT8"):
        rides = "its operator reads an INT8 activation, and multiplies INT8 with INT8"
        if is_sparse(weight):
            return Place("INT8", "sparse-int8", f"{rides}; at most 2 of every 4 codes are not zero")
        return Place("INT8", "int8", rides)
    gemm = weight.op in GEMM
    container, reason = weight.dtype, ""
    if container in backend.cannot_import:
        container = "INT4" if container == "INT2" else "INT8"
        reason = f"{backend.title} cannot import {weight.dtype}; "
    if container == "INT4" and (refusal := _int4_refusal(weight, backend, gemm)):
        container, reason = "INT8", reason + f"{refusal}; "
    if container != "INT4":
        return Place(container, "int8-weight", f"{reason}{container} codes, dequantized to the activations' type")
    if gemm:
        return Place(container, "int4-weight", f"{reason}{backend.title} takes INT4 weights in a GEMM")
    return Place(container, "int4-storage", f"{reason}{backend.title} keeps INT4 and dequantizes at run time")


def place_all(
    weights: Sequence[CodedWeight], backend: Backend, int8_layers: Collection[str] = frozenset()
) -> list[Place]:
    """Return the container of each weight, in order; INT8 for one that any of several operators needs so.

    Args:
        weights: The weights of a file.
        backend: Who takes them.
        int8_layers: Names of the operators that read a quantized activation.
    """
    places = [place(weight, backend, weight.node in int8_layers) for weight in weights]
    wide = {w.name: p for w, p in zip(weights, places, strict=True) if p.container == "INT8"}
    return [wide.get(weight.name, found) for weight, found in zip(weights, places, strict=True)]


def _int4_refusal(weight: CodedWeight, backend: Backend, gemm: bool) -> str | None:
    """Say why a backend cannot hold a weight as INT4, or None if it can."""
    if weight.stored.size % 2:
        return "4-bit tensors must have an even number of elements"
    if not gemm and not backend.conv_int4:
        return f"{backend.title} has no INT4 convolution"
    blocks = backend.gemm_int4_blocks
    if gemm and blocks is not None and weight.block_size not in blocks:
        sizes = " or ".join(str(size) for size in sorted(blocks))
        return f"{backend.title} takes INT4 only in blocks of {sizes} along K, and this weight has none"
    return None
