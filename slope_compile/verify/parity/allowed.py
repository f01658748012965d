"""How far the outputs of a given file may be apart: `tolerance.py`'s figures, and what quantized activations add."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from onnx import TensorProto

from slope_compile.qdq.activations import StoredQuantizer
from slope_compile.qdq.graph import live_names, scopes
from slope_compile.qdq.reader import iter_weights
from slope_compile.qdq.tensors import load_graph
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.chain.runners import Arrays, optimized_graph
from slope_compile.verify.parity.operators import products_in_bits, unknown_operators
from slope_compile.verify.parity.segments import moved_by_jitter
from slope_compile.verify.parity.tolerance import Tolerance, in_eight_bits, in_half, tolerance_of, widened
from slope_compile.verify.verdict import listed

_HALVES = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}


def live_weights(onnx: Path) -> Iterator[CodedWeight]:
    """Yield the weights of a file that its outputs depend on, without their numbers: of a tolerance the shapes tell.

    What else it holds must not make it look deeper.

    Weights of local functions have names of their own in each call, and all count.

    Args:
        onnx: The file.
    """
    graph = load_graph(onnx)
    live, names = live_names(graph), {one.name for one in graph.graph.initializer}
    for weight in iter_weights(onnx, numbers=False):
        stored = {weight.name, f"{weight.name}.codes"}
        if stored & live or not stored & names:
            yield weight


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
    floats = tolerance_of(live_weights(onnx), ten_bits=True)
    precision, tensors = ("fp32", 0) if placed is None or not placed.is_file() else half_tensors(placed)
    floats = floats if precision == "fp32" else in_half(floats, tensors, precision)
    return of_outputs(floats, onnx, weights, quantizers, feeds)


def of_file(onnx: Path) -> Tolerance:
    """Return what float32 allows of a file: that of its weights, and of the products inside MatMulNBits.

    Args:
        onnx: The file.
    """
    return tolerance_of(live_weights(onnx), products=products_in_bits(onnx))


def of_default(floats: Tolerance, onnx: Path, quantizers: Sequence[StoredQuantizer]) -> Tolerance:
    """Return the tolerance of ONNX Runtime's default optimizations, which may replace products by MatMulNBits.

    Args:
        floats: That of the file's outputs.
        onnx: The file. Where it has coded products, ONNX Runtime is asked what it makes of them.
        quantizers: Its quantizers of activations. Where there are any, ONNX Runtime computes in integers and rounds by
            rules of its own, which nothing bounds; so it may in operators that are not known here.

    Raises:
        NotCheckedError: If it must be asked, and is not installed.
    """
    if quantizers:
        return Tolerance(math.inf, "ONNX Runtime's integer operators round by rules of their own")
    if unknown := unknown_operators(onnx):
        return Tolerance(math.inf, f"how {listed(unknown, 3)} sum up and round is not known here")
    if not any(one.op in ("MatMul", "Gemm") and one.codes is not None for one in live_weights(onnx)):
        return floats
    replaced = [
        scope.integer(node, "block_size", 0)
        for scope in scopes(optimized_graph(onnx))
        for node in scope.nodes
        if node.op_type == "MatMulNBits"
    ]
    return in_eight_bits(floats, replaced)


def half_tensors(placed: Path) -> tuple[str, int]:
    """Return the precision of a placed file, and how many of its tensors are computed in half precision."""
    graph = load_graph(placed).graph
    computed = {name for node in graph.node for name in node.output}
    kinds = [
        _HALVES[value.type.tensor_type.elem_type]
        for value in (*graph.value_info, *graph.output)
        if value.name in computed and value.type.tensor_type.elem_type in _HALVES
    ]
    return ("bf16" if "bf16" in kinds else "fp16" if kinds else "fp32"), len(kinds)
