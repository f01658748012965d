"""Reads the quantizers of activations back from an ONNX file: QuantizeLinear of no constant, and DequantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.qdq.graph import MOVES, Scope, is_standard, scopes
from slope_compile.qdq.tensors import REMEDY, dtype_name, load_graph, to_numpy

RANGES = {"INT8": (-128, 127), "UINT8": (0, 255)}
NONNEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax")  # what these make is not below 0
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")
_PICKS = (*MOVES, "MaxPool", "Slice", "Split", "Gather")  # what these make is some of the values that they read first
NESTED_CONCATS = 2  # one inside the other, looked into for the sign of what they make
_FOLLOWED = 16  # nodes that only move values, one behind the other


@dataclass(frozen=True)
class StoredQuantizer:
    """One QuantizeLinear with its DequantizeLinear.

    Attributes:
        name: The scale's name without `.scale`, such as `layer1.0.conv1.input`.
        node: Name of the QuantizeLinear.
        output: The value of integers that it makes.
        scale: The step, float32.
        zero_point: 0 wherever TensorRT takes it.
        low: Lowest level that can come out, by a Clip or Relu before it or by its type.
        high: Highest level.
        again: Whether it reads only what it made itself, moved or picked from: then it changes no number.
    """

    name: str
    node: str
    output: str
    scale: float
    zero_point: int
    low: int
    high: int
    again: bool = False


def stored_quantizers(source: Path | onnx.ModelProto) -> list[StoredQuantizer]:
    """Return every quantizer of activations in the main graph, in graph order.

    Args:
        source: An ONNX file, or a model.

    Raises:
        ArtifactError: If a scale or zero point is no constant or no single number, the integers are neither INT8 nor
            UINT8, or they are not dequantized with the same scale and zero point.
    """
    model, place = (source, None) if isinstance(source, onnx.ModelProto) else (load_graph(source), source)
    scope = next(iter(scopes(model)))
    dequantizers: dict[str, list[NodeProto]] = {}
    for node in scope.nodes:
        if is_standard(node, "DequantizeLinear"):
            dequantizers.setdefault(node.input[0], []).append(node)
    found = [
        (node, _read(scope, node, dequantizers.get(node.output[0], []), place))
        for node in scope.nodes
        if is_standard(node, "QuantizeLinear") and not isinstance(scope.find(node.input[0])[2], TensorProto)
    ]
    made = {one.output: one for _, one in found}
    return [replace(one, again=_is_again(scope, node, one, made)) for node, one in found]


def is_quantized(scope: Scope, name: str) -> bool:
    """Return whether a value is dequantized from what a QuantizeLinear made as the graph runs."""
    for _ in range(_FOLLOWED):
        scope, name, source = scope.find(name)
        if not isinstance(source, NodeProto):
            return False
        if is_standard(source, "DequantizeLinear"):
            scope, name, maker = scope.find(source.input[0])
            if not isinstance(maker, NodeProto) or not is_standard(maker, "QuantizeLinear"):
                return False
            return not isinstance(scope.find(maker.input[0])[2], TensorProto)
        if not any(is_standard(source, op) for op in MOVES):
            return False
        name = source.input[0]
    return False


def _is_again(scope: Scope, node: NodeProto, one: StoredQuantizer, made: Mapping[str, StoredQuantizer]) -> bool:
    """Whether a quantizer reads only values of its own grid: ONNX Runtime leaves such pairs around a MaxPool."""
    name = node.input[0]
    for _ in range(_FOLLOWED):
        _, name, source = scope.find(name)
        if not isinstance(source, NodeProto) or not source.input:
            return False
        if is_standard(source, "DequantizeLinear"):
            before = made.get(source.input[0])
            if before is None or before.output == one.output:
                return False
            same = (before.name, before.scale, before.zero_point) == (one.name, one.scale, one.zero_point)
            return same and one.low <= before.low and before.high <= one.high
        if not any(is_standard(source, op) for op in _PICKS):
            return False
        name = source.input[0]
    return False


def _read(scope: Scope, node: NodeProto, users: list[NodeProto], place: Path | None) -> StoredQuantizer:
    scale_name, scale = _number(scope, node, 1, place)
    zero_name, zero_point = _number(scope, node, 2, place)
    declared = scope.integer(node, "output_dtype", 0) or TensorProto.UINT8
    kind = dtype_name(zero_name[1] if zero_name else TensorProto(data_type=declared))
    if kind not in RANGES or scale_name is None:
        raise ArtifactError(f"The activation quantizer '{node.name}' makes {kind}; INT8 or UINT8 is read here.", REMEDY)
    for user in users:
        same = list(user.input[1:]) == list(node.input[1:])
        if not same and [_number(scope, user, index, place)[1] for index in (1, 2)] != [scale, zero_point]:
            raise ArtifactError(f"'{user.name}' does not undo '{node.name}': scale or zero point differ.", REMEDY)
    if not users:
        raise ArtifactError(f"Nothing dequantizes what '{node.name}' makes.", REMEDY)
    low, high = _clipped(scope, node.input[0], np.float32(scale), RANGES[kind], place)
    name = scale_name[0].removesuffix(".scale")
    return StoredQuantizer(name, str(node.name), node.output[0], float(scale), int(zero_point), low, high)


def _number(
    scope: Scope, node: NodeProto, index: int, place: Path | None
) -> tuple[tuple[str, TensorProto] | None, float]:
    """Return a constant input of one number with its name, or (None, 0) where there is none."""
    if index >= len(node.input) or not node.input[index]:
        return None, 0.0
    _, name, source = scope.find(node.input[index])
    if not isinstance(source, TensorProto):
        raise ArtifactError(f"'{node.name}' computes its scale or zero point as the graph runs.", REMEDY)
    array = to_numpy(source, place, name)
    if array.size != 1:
        raise ArtifactError(f"'{node.name}' has {array.size} scales or zero points; TensorRT takes one.", REMEDY)
    return (name, source), float(array.reshape(()))


def _clipped(
    scope: Scope, name: str, scale: np.float32, limits: tuple[int, int], place: Path | None
) -> tuple[int, int]:
    """Return the levels that can come out, given what clips right before."""
    low, high = limits
    for _ in range(_FOLLOWED):
        scope, name, source = scope.find(name)
        if not isinstance(source, NodeProto) or not source.input:
            return low, high
        if any(is_standard(source, op) for op in NONNEGATIVE):
            return max(low, 0), high
        if is_standard(source, "Clip"):
            ends = [_number(scope, source, index, place) for index in (1, 2)]
            lowest, highest = (_level(end, limit, scale) for end, limit in zip(ends, limits, strict=True))
            return max(low, lowest), min(high, highest)
        if not any(is_standard(source, op) for op in (*MOVES, *_POOLS)):
            return (max(low, 0) if _is_nonnegative(scope, name, NESTED_CONCATS) else low), high
        name = source.input[0]
    return low, high


def _level(end: tuple[tuple[str, TensorProto] | None, float], limit: int, scale: np.float32) -> int:
    """Return the level at which a Clip ends; the type's own where the Clip has no end, or none that the type has."""
    constant, value = end
    if constant is None:
        return limit
    if math.isnan(value):
        raise ArtifactError(f"'{constant[0]}', an end of a Clip before an activation quantizer, is NaN.", REMEDY)
    with np.errstate(all="ignore"):
        level = float(np.float32(value) / scale)
    return round(level) if math.isfinite(level) else limit


def _is_nonnegative(scope: Scope, name: str, concats: int) -> bool:
    """Return whether a value comes from Relus or their like, through nothing that could make it negative."""
    for _ in range(_FOLLOWED):
        scope, name, source = scope.find(name)
        if not isinstance(source, NodeProto) or not source.input:
            return False
        if any(is_standard(source, op) for op in NONNEGATIVE):
            return True
        if is_standard(source, "Concat") and concats:
            return all(_is_nonnegative(scope, one, concats - 1) for one in source.input)
        if not any(is_standard(source, op) for op in (*MOVES, *_POOLS, "QuantizeLinear", "DequantizeLinear")):
            return False
        name = source.input[0]
    return False
