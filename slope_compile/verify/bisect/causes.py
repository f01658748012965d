"""The likely cause of a divergence: told from constants first, then from the graph, then from the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, helper

from slope_compile.placement.rounding import rounded
from slope_compile.qdq.graph import is_standard
from slope_compile.qdq.reader import NARROW
from slope_compile.verify.bisect.arrays import array_cause, weight_cause
from slope_compile.verify.bisect.distance import relative_error
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.parameters import attributes_of, constant_of, parameters
from slope_compile.verify.bisect.points import Key, Side
from slope_compile.verify.bisect.search import Local, Points
from slope_compile.verify.bisect.tensors import tensor_cause
from slope_compile.verify.chain.runners import Array, Arrays

FEW = 8  # integers


@dataclass(frozen=True)
class Cause:
    """Why a tensor is not reproduced.

    Args:
        words: What is wrong.
        layer: The layer or quantizer to blame, where it is not the one that makes the tensor.
    """

    words: str
    layer: str | None = None


def likely_cause(reference: Side, tested: Side, feed: Arrays, points: Points, found: Local) -> Cause:
    """Return why a tensor is not reproduced.

    Args:
        reference: The side that is right.
        tested: The side that differs.
        feed: The inputs with which it was found.
        points: What both sides have in common.
        found: The tensor.
    """
    nodes = computing(tested, found.key, points) if isinstance(tested, OnnxSide) else []
    layers = _layers(tested, nodes) if isinstance(tested, OnnxSide) else [found.key.name]
    quantizer = _lone_quantizer(tested, nodes, layers, points)
    if quantizer is not None:
        return quantizer
    told = [_quantizer(reference, tested, found.key.name)] if found.key.role == "quantizer" else []
    told += [told for layer in layers for told in _constants(reference, tested, layer)]
    if not any(told) and found.why:
        told = [f"cannot be computed: {found.why}"]
    if not any(told) and isinstance(tested, OnnxSide):
        if tested.optimized:
            told = [_fused(reference, tested, feed, points, found)]
        elif isinstance(reference, OnnxSide):
            told = [*_structure(reference, tested, found, points, nodes)]
        else:
            told = [_other_gelu(reference, tested, feed, points, found, nodes)]
    return Cause("; ".join(filter(None, told)) or tensor_cause(found.reference, found.tested))


def computing(tested: OnnxSide, key: Key, points: Points) -> list[NodeProto]:
    """Return the nodes that compute a tensor from the common tensors before it, without those of constants."""
    graph = tested.graph
    _, nodes = graph.segment(graph.keys[key], {graph.keys[other] for other in points.keys})
    return [node for node in nodes if any(graph.is_varying(name) for name in node.output)]


def _layers(tested: OnnxSide, nodes: list[NodeProto]) -> list[str]:
    names = [tested.graph.layer_of(node) for node in nodes]
    return list(dict.fromkeys(name for name in names if name is not None))


def _quantizer(reference: Side, tested: Side, name: str) -> str | None:
    expected, found = reference.levels().get(name), tested.levels().get(name)
    if expected is None or found is None:
        return None
    zero_point = getattr(found, "zero_point", 0)
    if zero_point:
        return f"zero point not zero: the quantizer {name} has {zero_point}"
    if np.float32(expected.scale) != np.float32(found.scale):
        return f"the step of the quantizer {name}: {array_cause(*_vectors(expected.scale, found.scale))}"
    if expected.low < 0 <= found.low:
        return f"unsigned clipped: the quantizer {name} has levels from {found.low}, expected from {expected.low}"
    if (expected.low, expected.high) != (found.low, found.high):
        wanted = f"expected {expected.low} to {expected.high}"
        return f"the quantizer {name} has levels {found.low} to {found.high}, {wanted}"
    return None


def _vectors(expected: float, found: float) -> tuple[Array, Array]:
    return np.asarray([expected], np.float32), np.asarray([found], np.float32)


def _constants(reference: Side, tested: Side, layer: str) -> Iterator[str]:
    """Yield which of a layer's constants differ, and how."""
    expected, found = parameters(reference, layer), parameters(tested, layer)
    if expected is None or found is None:
        return
    if expected.weight is not None and found.weight is not None:
        coded = found.coded is not None and found.coded.codes is not None
        wanted = expected.weight if coded else _as_stored(expected.weight, found.weight, tested)
        told = weight_cause(wanted, found.weight, found.coded)
        if told is None and found.coded is not None and found.coded.value_dtype in NARROW and not _half(tested):
            told = f"rounded to lower precision: the graph makes {found.coded.value_dtype} of it"
        if told:
            yield f"weight: {told}"
    for name in {**expected.others, **found.others}:
        a, b = expected.others.get(name), found.others.get(name)
        if a is None or b is None:
            array = b if a is None else a
            if array is not None and array.any():
                yield f"{name} {'extra' if a is None else 'missing'}"
        else:
            told = array_cause(_as_stored(a, b, tested), b)
            if told:
                yield f"another {name}: {told}"
    for name in expected.attributes.keys() & found.attributes.keys():
        a, b = expected.attributes[name], found.attributes[name]
        if not np.array_equal(np.float32(a), np.float32(b)):
            yield f"{name} {b}, expected {a}"


def _half(tested: Side) -> str | None:
    return tested.half if isinstance(tested, OnnxSide) else None


def _as_stored(expected: Array, found: Array, tested: Side) -> Array:
    """Return a constant as a placed file in half precision rounds it, where it does not hold it as it is."""
    half = _half(tested)
    if half is None or expected.dtype != np.float32 or np.array_equal(expected, found):
        return expected
    return rounded(expected, {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[half])


def _lone_quantizer(tested: Side, nodes: list[NodeProto], layers: list[str], points: Points) -> Cause | None:
    """Return a quantizer that only one side has, at the tensor in question."""
    if isinstance(tested, OnnxSide):  # and the layers on either side of what was computed
        values = {name for node in nodes for name in (*node.input, *node.output)}
        layers = [*layers, *(key.name for key, value in tested.graph.keys.items() if value in values)]
    for some, what, who in (
        (points.missing, "missing", "the reference quantizes here"),
        (points.extra, "extra", "the reference does not quantize here"),
    ):
        for name in some:
            layer, _, side = name.rpartition(".")
            if layer in layers:
                return Cause(f"{what} {side} quantizer: {who}", name)
    return None


def _fused(reference: Side, tested: OnnxSide, feed: Arrays, points: Points, found: Local) -> str | None:
    """Return whether the same part of the file is right without ONNX Runtime's optimizations."""
    again = _computed(reference, OnnxSide(tested.path), feed, points, found)
    if again is None or not relative_error(found.reference, again) <= found.allowed:
        return None
    return f"fused at lower precision by ONNX Runtime's optimizer: {tensor_cause(found.reference, found.tested)}"


def _other_gelu(
    reference: Side, tested: OnnxSide, feed: Arrays, points: Points, found: Local, nodes: list[NodeProto]
) -> str | None:
    """Return whether the same nodes with the other formula of Gelu make what torch made."""
    gelus = [node for node in nodes if is_standard(node, "Gelu")]
    if not gelus:
        return None
    here = attributes_of(gelus[0]).get("approximate", b"none")
    other = b"none" if here == b"tanh" else b"tanh"

    def exchange(model: ModelProto) -> None:
        for node in model.graph.node:
            if is_standard(node, "Gelu"):
                del node.attribute[:]
                node.attribute.append(helper.make_attribute("approximate", other))

    again = _computed(reference, tested, feed, points, found, exchange)
    if again is None or not relative_error(found.reference, again) <= found.allowed:
        return None
    return f"Gelu's approximate is {here.decode(errors='replace')}, expected {other.decode()}"


def _computed(
    reference: Side,
    side: OnnxSide,
    feed: Arrays,
    points: Points,
    found: Local,
    change: Callable[[ModelProto], None] | None = None,
) -> Array | None:
    """Return a tensor as a file makes it of the reference's own tensors before it; None where its shape is another."""
    graph, place = side.graph, side.graph.keys[found.key]
    at = {graph.keys[key]: key for key in points.keys}
    begins, _ = graph.segment(place, at.keys())
    known = reference.values(feed, [at[name] for name in begins if name in at])
    given = {graph.keys[key]: array for key, array in known.items()}
    again = side.compute(feed, given, [place], change)[place]
    return again if again.shape == found.reference.shape else None


def _structure(side: OnnxSide, tested: OnnxSide, found: Local, points: Points, nodes: list[NodeProto]) -> Iterator[str]:
    """Yield how the nodes that compute a tensor differ from those of the reference file."""
    reference = side.graph
    if found.key not in reference.keys:
        return
    _, behind = reference.segment(reference.keys[found.key], {reference.keys[other] for other in points.keys})
    expected = [node for node in behind if any(reference.is_varying(name) for name in node.output)]
    a, b = ([node for node in some if node.op_type != "Cast"] for some in (expected, nodes))
    if [node.op_type for node in a] != [node.op_type for node in b]:
        told = tensor_cause(found.reference, found.tested)
        yield f"{told} (computed by {_operators(b)}, expected {_operators(a)})"
        return
    for old, new in zip(a, b, strict=True):
        before, after = attributes_of(old), attributes_of(new)
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                yield f"{new.op_type}'s {name} is {after.get(name)}, expected {before.get(name)}"
        for first, second in zip(old.input, new.input, strict=False):
            constants = constant_of(reference, first), constant_of(tested.graph, second)
            if constants[0] is not None and constants[1] is not None:
                differs = _other(_as_stored(constants[0], constants[1], tested), constants[1])
                if differs:
                    yield f"{new.op_type}'s constant {second}: {differs}"


def _other(expected: Array, found: Array) -> str | None:
    """Return how a constant differs: a few integers are spelt out, which say axes and shapes."""
    if expected.dtype.kind == "i" and max(expected.size, found.size) <= FEW and not np.array_equal(expected, found):
        return f"is {found.tolist()}, expected {expected.tolist()}"
    return array_cause(expected, found)


def _operators(nodes: list[NodeProto]) -> str:
    return ", ".join(node.op_type for node in nodes) or "nothing"
