"""An ONNX file with quantized activations, changed to be compared: cut at its quantizers, or jittered before them.

Rounding makes a deep quantized network chaotic: a last bit that differs turns one integer, which moves the sums behind
it, which turn more. So two correct implementations, run from end to end, may differ by a large share of all integers.

Cut: each QuantizeLinear hands its integers out, and what reads them takes other ones, the trained model's. Between
the cuts there are only floats, whose errors are bounded (`tolerance.py`), and nothing turned in one reaches another.

Jittered: x + eps * max|x| * uniform(-1, 1) goes into each QuantizeLinear. How far that moves the outputs is how far any
implementation with errors of that size may be, where only outputs can be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from slope_compile.qdq.activations import StoredQuantizer
from slope_compile.qdq.tensors import load_model
from slope_compile.verify.runners import Arrays, load_session

if TYPE_CHECKING:
    import onnxruntime as ort

DRAWS = 3  # of jitter
_DECIDES = ("TopK", "Loop", "NonMaxSuppression", "NonZero")  # a detector's choices, which a last bit may turn


def cut_session(path: Path, integers: Iterable[str]) -> ort.InferenceSession:
    """Return the file in ONNX Runtime, optimizations disabled, cut at values of integers.

    Each value becomes an input of its name and an output, what the file makes there, called `made(NAME)`.

    Args:
        path: The file.
        integers: Outputs of QuantizeLinear nodes, INT8.
    """
    model = load_model(path)
    names = set(integers)
    kept = [value for value in model.graph.value_info if value.name not in names]
    del model.graph.value_info[:]
    model.graph.value_info.extend(kept)
    for node in model.graph.node:
        if node.output and node.output[0] in names:
            model.graph.input.append(helper.make_tensor_value_info(node.output[0], TensorProto.INT8, None))
            node.output[0] = made(node.output[0])
            model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.INT8, None))
    return _session(model, path)


def behind_choices(model: onnx.ModelProto, integers: Iterable[str]) -> frozenset[str]:
    """Return those values of integers whose segment begins with a choice, as where a detector's heads begin."""
    names, behind, found = set(integers), set[str](), set[str]()
    for node in model.graph.node:  # in the order in which they run
        if node.op_type in _DECIDES or behind.intersection(node.input):
            into = found if names.intersection(node.output) else behind
            into.update(filter(None, node.output))
    return frozenset(found)


def made(name: str) -> str:
    """Return the output of a cut session that holds what the file makes of a value."""
    return f"made({name})"


def moved_by_jitter(path: Path, stored: Sequence[StoredQuantizer], feeds: Sequence[Arrays], eps: float) -> float:
    """Return how far jitter moves the outputs, relative to the largest of each: the largest of a few draws.

    Args:
        path: The file.
        stored: Its quantizers of activations.
        feeds: Inputs, one mapping a feed.
        eps: Size of the jitter, relative to the largest value of each tensor that is quantized.
    """
    still, *others = (
        [_run(session, feed) for feed in feeds]
        for session in (
            _session(_jittered(path, stored, size, seed), path) for seed, size in enumerate([0.0] + [eps] * DRAWS)
        )
    )
    largest = {name: max(float(np.abs(feed[name]).max(initial=0)) for feed in still) for name in still[0]}
    return max(
        float(np.abs(b[name].astype(np.float64) - a[name]).max(initial=0)) / (largest[name] or 1.0)
        for other in others
        for a, b in zip(still, other, strict=True)
        for name in a
    )


def _jittered(path: Path, stored: Sequence[StoredQuantizer], eps: float, seed: int) -> onnx.ModelProto:
    model = load_model(path)
    quantizers = {quantizer.output for quantizer in stored}
    nodes: list[NodeProto] = []
    for index, node in enumerate(model.graph.node):
        if eps and node.output and node.output[0] in quantizers:
            x, name = node.input[0], f"{node.output[0]}.jitter"
            draw = float(seed * len(model.graph.node) + index)
            nodes += [
                helper.make_node("Abs", [x], [f"{name}.abs"]),
                helper.make_node("ReduceMax", [f"{name}.abs"], [f"{name}.max"], keepdims=0),
                helper.make_node("RandomUniformLike", [x], [f"{name}.noise"], low=-eps, high=eps, seed=draw),
                helper.make_node("Mul", [f"{name}.noise", f"{name}.max"], [f"{name}.error"]),
                helper.make_node("Add", [x, f"{name}.error"], [name]),
            ]
            node.input[0] = name
        nodes.append(node)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def _run(session: ort.InferenceSession, feed: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _session(model: onnx.ModelProto, path: Path) -> ort.InferenceSession:
    return load_session(model.SerializeToString(), folder=path.parent)
