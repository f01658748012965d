"""How far the outputs of a given file may be apart: `tolerance.py`'s figures, and what quantized activations add."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnx import TensorProto

from slope_compile.qdq.activations import StoredQuantizer
from slope_compile.qdq.tensors import load_model
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.runners import Arrays
from slope_compile.verify.segments import moved_by_jitter
from slope_compile.verify.tolerance import Tolerance, in_half, tolerance_of, widened

_HALVES = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def of_outputs(
    floats: Tolerance,
    onnx: Path,
    weights: Sequence[CodedWeight],
    quantizers: Sequence[StoredQuantizer],
    feeds: Sequence[Arrays],
) -> Tolerance:
    """Return the tolerance of a file's outputs from end to end.

    Args:
        floats: That of its segments.
        onnx: The file.
        weights: Its weights.
        quantizers: Its quantizers of activations; where there are any, the file is run.
        feeds: Inputs to run it with, one mapping a feed.

    Raises:
        NotCheckedError: If it must be run, and ONNX Runtime is not installed.
    """
    if not quantizers:
        return floats
    return widened(floats, len(weights), lambda eps: moved_by_jitter(onnx, quantizers, feeds, eps))


def of_engine(
    onnx: Path,
    weights: Sequence[CodedWeight],
    quantizers: Sequence[StoredQuantizer],
    feeds: Sequence[Arrays],
    placed: Path | None = None,
) -> Tolerance:
    """Return the tolerance between an engine and the file that was exported.

    Args:
        onnx: The exported file.
        weights: As of `of_outputs`.
        quantizers: As of `of_outputs`.
        feeds: As of `of_outputs`.
        placed: What the engine was built from, which says how much of it is in half precision; None: nothing is.
    """
    floats = tolerance_of(weights, ten_bits=True)
    precision, tensors = ("fp32", 0) if placed is None or not placed.is_file() else half_tensors(placed)
    floats = floats if precision == "fp32" else in_half(floats, tensors, precision)
    return of_outputs(floats, onnx, weights, quantizers, feeds)


def half_tensors(placed: Path) -> tuple[str, int]:
    """Return the precision of a placed file, and how many of its tensors are computed in half precision."""
    graph = load_model(placed).graph
    computed = {name for node in graph.node for name in node.output}
    kinds = [
        _HALVES[value.type.tensor_type.elem_type]
        for value in (*graph.value_info, *graph.output)
        if value.name in computed and value.type.tensor_type.elem_type in _HALVES
    ]
    return ("bf16" if "bf16" in kinds else "fp16" if kinds else "fp32"), len(kinds)
