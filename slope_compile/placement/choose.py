"""Which placement each weight gets, and why: the cheapest possible one, unless the recipe asks for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from slope_compile.errors import BackendError, nearest
from slope_compile.placement.cost import TIE, Cost, cost
from slope_compile.placement.layers import Layer, read_layers
from slope_compile.placement.rounding import rounding
from slope_compile.placement.rules import FLOATS, PLACEMENTS, SPARSE, possible, refusal, sparse_doubt, storage
from slope_compile.placement.situation import Situation
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import Placement

_WHAT = {
    "sparse-int8": "INT8 times INT8, at most 2 of every 4 codes are not zero",
    "int8": "INT8 times INT8",
    "sparse-fp16": "constants with the zeros of 2:4 in place",
    "int4-weight": "INT4 codes, dequantized inside the matrix product",
    "int8-weight": "INT8 codes, dequantized to the activations' type",
    "int4-storage": "INT4 codes, dequantized to the activations' type as the engine runs",
    "float": "constants in the activations' type",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """What becomes of one weight.

    Args:
        container: ONNX's name of the type that the backend gets: `INT4`, `INT8`, `FLOAT`, …
        placement: `sparse-int8`, `int8`, `sparse-fp16`, `int4-weight`, `int8-weight`, `int4-storage` or `float`.
        reason: Why.
        block_size: Input channels that share a scale in the placed file; 0 for one scale per channel or tensor.
        costs: Possible placement -> estimated seconds at the opt batch (cost.py); not measured.
    """

    container: str
    placement: str
    reason: str
    block_size: int = 0
    costs: Mapping[str, float] = field(default_factory=dict)


def choose_places(model: Path, weights: Sequence[CodedWeight], situation: Situation) -> list[Place]:
    """Return what becomes of every weight, in order.

    Of several operators that multiply with one tensor in several ways, all get the same placement.

    Args:
        model: The ONNX file.
        weights: What the reader found in it.
        situation: The target, who builds for it, and what the recipe asks for.

    Raises:
        ArtifactError: If the file is malformed.
        BackendError: If an override fits no layer, or asks for what the rules forbid.
    """
    layers = read_layers(model, weights)
    _require_matches(layers, situation)
    named: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        named.setdefault(layer.name, []).append(index)
    chosen: dict[int, Place] = {}
    for indices in named.values():
        places = _choose([layers[i] for i in indices], [weights[i] for i in indices], situation)
        chosen.update(zip(indices, places, strict=True))
    return [chosen[index] for index in range(len(layers))]


def _choose(uses: list[Layer], weights: list[CodedWeight], situation: Situation) -> list[Place]:
    """Return one placement of a tensor, told for each of its uses."""
    asked = _override(uses[0], situation)
    if asked is not None:
        for use in uses:
            _require_possible(use, *asked, situation)
    costs = {
        placement: [cost(placement, use, situation) for use in uses]
        for placement in PLACEMENTS
        if all(placement in possible(use, situation) for use in uses)
        and _obstacle(placement, uses, weights, situation) is None
    }
    if asked is not None and (obstacle := _obstacle(asked[1], uses, weights, situation)):
        raise BackendError(
            f"build.placement: '{asked[0]}' asks for {asked[1]} for '{uses[0].label}', but {obstacle}.",
            f"Possible there: {', '.join(costs)}.",
        )
    taken = asked[1] if asked is not None else _cheapest(uses[0], costs)
    seconds: dict[str, float] = {placement: _seconds(found) for placement, found in costs.items()}
    places = []
    for index, use in enumerate(uses):
        container, block_size = storage(taken, use, situation)
        alternatives = {placement: found[index] for placement, found in costs.items()}
        reason = _reason(use, weights[index], taken, alternatives, asked, situation)
        places.append(Place(container, taken, reason, block_size, seconds))
    return places


def _obstacle(
    placement: Placement, uses: Sequence[Layer], weights: Sequence[CodedWeight], situation: Situation
) -> str | None:
    """Say what in the numbers, or among the uses of one tensor, stands against a placement that the rules allow."""
    kind = FLOATS[situation.precision]
    if placement == "sparse-fp16" and rounding(weights[0], kind).overflows:
        return f"its values are beyond {kind}"
    if placement == "int4-weight" and len(weights) > 1:
        # All uses read the same codes, so all must cut them into the same blocks of the same scales.
        blocks = {storage(placement, use, situation)[1] for use in uses}
        scales = {(weight.reduction_axis, np.asarray(weight.scale).tobytes()) for weight in weights}
        if len(blocks) > 1 or len(scales) > 1:
            return "its operators sum over different axes of it, or scale it differently"
    return None


def _cheapest(layer: Layer, costs: Mapping[Placement, list[Cost]]) -> Placement:
    """Return the placement of least time; of those within TIE of it the one with the fewest bytes.

    Codes become constants only where nothing else is possible, or where sparse FP16 kernels are likely: they would give
    up what was trained for nothing. Floats stay floats: what was not compressed is not touched unasked.
    """
    coded = [p for p, found in costs.items() if p != "float" and (p != "sparse-fp16" or all(c.sparse for c in found))]
    automatic: Sequence[Placement] = coded if coded and layer.bits is not None else ["float"]
    seconds = {placement: _seconds(costs[placement]) for placement in automatic}
    limit = min(seconds.values()) * (1 + TIE)
    near = [placement for placement in automatic if seconds[placement] <= limit]
    return min(near, key=lambda placement: (costs[placement][0].weight, PLACEMENTS.index(placement)))


def _seconds(costs: Sequence[Cost]) -> float:
    return sum((one.seconds for one in costs), 0.0)


def _override(layer: Layer, situation: Situation) -> tuple[str, Placement] | None:
    """Return the last pattern that fits a layer, and what it asks for."""
    found = None
    for pattern, placement in situation.overrides.items():
        if fnmatchcase(layer.label, pattern):
            found = pattern, placement
    return found


def _require_matches(layers: Sequence[Layer], situation: Situation) -> None:
    labels = {layer.label for layer in layers}
    for pattern in situation.overrides:
        if not any(fnmatchcase(label, pattern) for label in labels):
            raise BackendError(
                f"build.placement: '{pattern}' fits no layer of the model that has a weight.",
                nearest(pattern, labels) if labels else "The model has none.",
            )


def _require_possible(layer: Layer, pattern: str, placement: Placement, situation: Situation) -> None:
    found = refusal(placement, layer, situation)
    if found is None:
        return
    allowed = ", ".join(possible(layer, situation))
    raise BackendError(
        f"build.placement: '{pattern}' asks for {placement} for '{layer.label}', which {situation.backend.title} "
        f"{situation.version} for {situation.target.name} does not allow: {found.reason} ({found.source}).",
        f"Possible there: {allowed}.",
    )


def _reason(
    layer: Layer,
    weight: CodedWeight,
    taken: Placement,
    costs: Mapping[Placement, Cost],
    asked: tuple[str, Placement] | None,
    situation: Situation,
) -> str:
    """Say in plain words what the layer gets and what decided it."""
    if asked is None and layer.bits is None:
        return f"stored as {layer.stored}: not compressed"
    parts = [_WHAT[taken]]
    if asked is not None:
        parts.append(f"asked for by build.placement '{asked[0]}'")
    parts.append(_numbers(layer, taken, costs, situation))
    if taken == "sparse-fp16":
        parts.append(str(rounding(weight, FLOATS[situation.precision])))
    if taken in SPARSE and (doubt := sparse_doubt(taken, layer, situation)):
        parts.append(f"sparse kernels are not likely: {doubt.reason}")
    if taken not in ("float", "sparse-fp16") and costs["float"].seconds * (1 + TIE) < costs[taken].seconds:
        more = costs["float"].weight / max(1, costs[taken].weight)
        parts.append(f"constants may be faster, and take {more:.2g} times the bytes: build.placement `float`")
    parts += _instead(layer, taken, situation)
    return "; ".join(parts)


def _numbers(layer: Layer, taken: Placement, costs: Mapping[Placement, Cost], situation: Situation) -> str:
    """Name the bound and the figures that it rests on."""
    here, plain = costs[taken], costs["float"]
    assumed = "" if layer.positions_known else " (output size unknown: one position per image assumed)"
    bound = f"{here.bound} bound at batch {situation.batch}{assumed}"
    if here.bound == "memory":
        return (
            f"{bound}: {_mb(here.moved)} MB moved, {_mb(plain.moved)} MB with {FLOATS[situation.precision]} constants"
        )
    narrower = [p for p, c in costs.items() if c.weight < here.weight]
    others = "".join(f", {p} {_us(costs[p].seconds)}" for p in (*narrower, "float") if p != taken)
    return f"{bound}: {_us(here.seconds)} estimated{others}"


def _instead(layer: Layer, taken: Placement, situation: Situation) -> list[str]:
    """Say why a placement that people would expect here is not possible."""
    if layer.bits is None or taken in ("sparse-int8", "int8"):
        expected: tuple[Placement, ...] = ("sparse-int8",) if taken == "int8" and layer.sparse else ()
    else:
        narrow: Placement = "int4-weight" if layer.is_gemm else "int4-storage"
        expected = (narrow,) if taken not in ("int4-weight", "int4-storage") and layer.bits <= 4 else ()
        if layer.sparse and taken not in SPARSE:
            expected += ("sparse-fp16",)
    found = [(placement, refusal(placement, layer, situation)) for placement in expected]
    return [f"no {placement}: {why.reason}" for placement, why in found if why is not None]


def _mb(count: int) -> str:
    return f"{count / 1e6:.3g}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"
