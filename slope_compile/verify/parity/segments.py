"""An ONNX file with quantized activations, changed to be compared: cut at its quantizers, or jittered before them.

Rounding makes a deep quantized network chaotic: a last bit that differs turns one integer, which moves the sums behind
it, which turn more. So two correct implementations, run from end to end, may differ by a large share of all integers.

Cut: each QuantizeLinear hands its integers out, and what reads them takes other ones, the trained model's. Between
the cuts there are only floats, whose errors are bounded (`tolerance.py`), and nothing turned in one reaches another.

Jittered: x + eps * max|x| * uniform(-1, 1) goes into each QuantizeLinear (from opset 22 on -1 or +1 alone: `_noise`).
How far that moves the outputs is how far any implementation with errors of that size may be, where only outputs can be
had.
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
from slope_compile.verify.chain.runners import Arrays, load_session

if TYPE_CHECKING:
    import onnxruntime as ort

DRAWS = 3  # of jitter of one size
GROWTH, GROWN = 4, 5  # where none of them turns an integer: up to 1024 times as large
LAST_RANDOM = 21  # opset up to which ONNX Runtime has RandomUniformLike
DECIDES = ("TopK", "Loop", "NonMaxSuppression", "NonZero")  # a detector's choices, which a last bit may turn


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
        if node.op_type in DECIDES or behind.intersection(node.input):
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
        eps: Size of the jitter, relative to the largest value of each tensor that is quantized. Where no draw turns an
            integer, it grows until one does, by `GROWTH` at a time: that few turn seldom does not make it a small move.
    """
    seeds = iter(range(1, 1 + DRAWS * (GROWN + 1)))
    still = [_run(_session(load_model(path), path), feed) for feed in feeds]
    for _ in range(GROWN + 1):
        sessions = [_session(_jittered(path, stored, eps, next(seeds)), path) for _ in range(DRAWS)]
        moved = max(_apart(still, [_run(session, feed) for feed in feeds]) for session in sessions)
        if moved:
            return moved
        eps *= GROWTH
    return 0.0


def _apart(still: Sequence[Arrays], other: Sequence[Arrays]) -> float:
    """Return the largest difference, relative to the largest value of its output."""
    largest = {name: max(float(np.abs(feed[name]).max(initial=0)) for feed in still) for name in still[0]}
    return max(
        float(np.abs(b[name].astype(np.float64) - a[name]).max(initial=0)) / (largest[name] or 1.0)
        for a, b in zip(still, other, strict=True)
        for name in a
    )


def _jittered(path: Path, stored: Sequence[StoredQuantizer], eps: float, seed: int) -> onnx.ModelProto:
    model = load_model(path)
    quantizers = {quantizer.output for quantizer in stored}
    nodes: list[NodeProto] = []
    opset = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    for index, node in enumerate(model.graph.node):
        if eps and node.output and node.output[0] in quantizers:
            x, name = node.input[0], f"{node.output[0]}.jitter"
            draw = float(seed * len(model.graph.node) + index)
            nodes += [
                helper.make_node("Abs", [x], [f"{name}.abs"]),
                helper.make_node("ReduceMax", [f"{name}.abs"], [f"{name}.max"], keepdims=0),
                *_noise(x, f"{name}.noise", eps, draw, opset),
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


def _noise(x: str, name: str, eps: float, draw: float, opset: int) -> list[NodeProto]:
    """Return nodes that make a value of noise in [-eps, eps], of the shape of `x`."""
    if opset <= LAST_RANDOM:
        return [helper.make_node("RandomUniformLike", [x], [name], low=-eps, high=eps, seed=draw)]
    # ONNX Runtime 1.31 has no later random operator but Dropout, which keeps, and doubles, one half: 0 or 2 eps.
    one = helper.make_tensor(f"{name}.eps", TensorProto.FLOAT, [1], [eps])
    constants = [("half", TensorProto.FLOAT, 0.5), ("on", TensorProto.BOOL, True), ("middle", TensorProto.FLOAT, eps)]
    return [
        *(
            helper.make_node("Constant", [], [f"{name}.{what}"], value=helper.make_tensor(what, kind, [], [value]))
            for what, kind, value in constants
        ),
        helper.make_node("Shape", [x], [f"{name}.shape"]),
        helper.make_node("ConstantOfShape", [f"{name}.shape"], [f"{name}.whole"], value=one),
        helper.make_node("Dropout", [f"{name}.whole", f"{name}.half", f"{name}.on"], [f"{name}.kept"], seed=int(draw)),
        helper.make_node("Sub", [f"{name}.kept", f"{name}.middle"], [name]),
    ]


def _run(session: ort.InferenceSession, feed: Arrays) -> Arrays:
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _session(model: onnx.ModelProto, path: Path) -> ort.InferenceSession:
    return load_session(model.SerializeToString(), folder=path.parent)
