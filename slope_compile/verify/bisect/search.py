"""The first tensor at which two implementations part: bisected from end to end, then proved layer by layer.

From end to end an error may hide (a ReLU cuts it off, a rounding absorbs it) and show again later, so what a bisection
finds is only an upper end. Whether a layer is at fault is told by that layer alone, given the reference's own inputs:
the prefix that the bisection leaves is checked in that way, tensor by tensor, up to the first that is not reproduced.

Quantized activations turn a last bit into whole levels, which set off others: there nothing is compared from end to
end, and each segment between quantizers is given the reference's integers (`steps.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from slope_compile.qdq.sites import Levels
from slope_compile.verify.bisect.distance import relative_error, share_beyond
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.points import Key, Side, best_named, groups, matched
from slope_compile.verify.bisect.torch_side import TorchSide
from slope_compile.verify.chain.runners import Array, Arrays
from slope_compile.verify.parity.allowed import half_tensors
from slope_compile.verify.parity.detections import FLOAT_SHARE
from slope_compile.verify.parity.segments import DECIDES
from slope_compile.verify.parity.steps import Quantized, StepDifference
from slope_compile.verify.parity.tolerance import EPS32, Tolerance, in_half
from slope_compile.verify.verdict import reason

BUDGET = 2**27  # bytes of tensors that are held of each side at a time
OTHER_NODES = 32.0  # sqrt(K) of a node that is no layer: a norm over 1024 features, an approximated exponential


@dataclass(frozen=True)
class Local:
    """One tensor as the tested side computes it from the reference's own tensors before it.

    Args:
        key: The tensor.
        error: max|difference| / max|reference|; of integers, the levels beyond a rounding, relative to the largest.
        allowed: How much of it the floats of that segment explain.
        within: Whether it is reproduced.
        reference: The reference's tensor.
        tested: The tested side's.
        why: Why it could not be computed, where it could not: then `tested` is empty.
    """

    key: Key
    error: float
    allowed: float
    within: bool
    reference: Array
    tested: Array
    why: str = ""


@dataclass(frozen=True)
class Points:
    """The tensors that two sides have in common, one key each, in the tested side's order.

    Args:
        keys: Theirs.
        sizes: Bytes of each, as float32, where known.
        missing: Quantizers of activations that only the reference has.
        extra: Those that only the tested side has.
    """

    keys: list[Key]
    sizes: list[int | None]
    missing: list[str]
    extra: list[str]

    @property
    def quantized(self) -> bool:
        """Whether activations are quantized on both sides."""
        return any(key.role == "quantizer" for key in self.keys)


def common_points(reference: Side, tested: Side, feed: Arrays) -> Points:
    """Return what both sides can be compared at.

    Args:
        reference: One side.
        tested: The other.
        feed: Inputs, run where only a run tells what there is.
    """
    before, after = reference.keys(feed), tested.keys(feed)
    keys = [key for key in matched(before, after) if key.role != "read"]
    if isinstance(tested, OnnxSide):
        places: dict[str, list[Key]] = {}
        for key in keys:
            places.setdefault(tested.graph.keys[key], []).append(key)
        keys = [best_named(several) for several in places.values()]
    sizes = [before[key] if before[key] is not None else after[key] for key in keys]
    calls = [{(key.name, key.call) for key in side if key.role == "quantizer"} for side in (before, after)]
    missing, extra = ([name for name, _ in sorted(a - b)] for a, b in (calls, calls[::-1]))
    return Points(keys, sizes, missing, extra)


def first_samples(reference: Side, tested: Side, feed: Arrays, count: int) -> Arrays:
    """Return the first samples of a feed, where both sides take a batch of any size; else the feed."""
    if not (reference.free_batch and tested.free_batch):
        return feed
    return {name: array[:count] for name, array in feed.items()}


def bisect(reference: Side, tested: Side, feed: Arrays, keys: Sequence[Key], allowed: float) -> int:
    """Return the index of a tensor that diverges from end to end while the one before it does not.

    The last one is taken to diverge. Two tensors are held at a time; log2(n) runs of each side.

    Args:
        reference: One side.
        tested: The other.
        feed: Inputs.
        keys: Common tensors in order.
        allowed: How far a tensor may be off, relative to its largest value.
    """
    low, high = -1, len(keys) - 1
    while high - low > 1:
        middle = (low + high) // 2
        key = keys[middle]
        expected = reference.values(feed, [key])[key]
        try:
            error = relative_error(expected, tested.values(feed, [key])[key])
        except Exception:  # whatever keeps ONNX Runtime from going so far lies before
            error = math.inf
        low, high = (middle, high) if error <= allowed else (low, middle)
    return high


def locally(
    reference: Side, tested: Side, feed: Arrays, points: Points, part: slice = slice(None), budget: int = BUDGET
) -> Iterator[Local]:
    """Yield each common tensor as the tested side makes it from the reference's, in order, a few runs at a time.

    Args:
        reference: One side.
        tested: The other.
        feed: Inputs.
        points: What they have in common.
        part: Which of them to yield.
        budget: Bytes of tensors held at a time.
    """
    if isinstance(tested, TorchSide):
        yield from _layers_alone(reference, tested, feed, points, part, budget)
    elif isinstance(tested, OnnxSide):
        yield from _segments(reference, tested, feed, points, part, budget)


def _segments(
    reference: Side, tested: OnnxSide, feed: Arrays, points: Points, part: slice, budget: int
) -> Iterator[Local]:
    graph = tested.graph
    place = {key: graph.keys[key] for key in points.keys}
    at = {value: key for key, value in place.items()}
    allowance, levels = _Allowance(tested), reference.levels()
    wanted, sizes = points.keys[part], points.sizes[part]
    for group in groups(sizes, budget // 2):  # the other half is for what the group is computed from
        keys = [wanted[index] for index in group]
        segments = {key: graph.segment(place[key], at.keys()) for key in keys}
        ends = {at[end] for begins, _ in segments.values() for end in begins if end in at}
        reads = [Key(key.name, "read", key.call) for key in keys if key.role == "quantizer"]
        known = reference.values(feed, [*keys, *ends, *reads])
        given = {place[key]: known[key] for key in ends}
        found, why = _computed(tested, feed, given, [place[key] for key in keys])
        for key in keys:
            nodes = segments[key][1]
            share = FLOAT_SHARE if any(node.op_type in DECIDES for node in nodes) else 0.0
            allowed = allowance(nodes)
            if place[key] in why:
                yield Local(key, math.inf, allowed, False, known[key], np.empty(0, np.float32), why[place[key]])
                continue
            if key.role == "quantizer":
                yield _step(levels[key.name], key, known, found[place[key]], allowed, share)
                continue
            a, b = known[key], found[place[key]]
            error = relative_error(a, b)
            within = error <= allowed or bool(share and share_beyond(a, b, allowed) <= share)
            yield Local(key, error, allowed, within, a, b)


def _computed(
    tested: OnnxSide, feed: Arrays, given: dict[str, Array], wanted: list[str]
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return values of segments; where ONNX Runtime fails, those that it can compute, and why not the others."""
    try:
        return tested.compute(feed, given, wanted), {}
    except Exception:  # one value that cannot be had must not hide the others: each by itself then
        found: dict[str, Array] = {}
        why: dict[str, str] = {}
        for value in wanted:
            _compute_one(tested, feed, given, value, found, why)
        return found, why


def _compute_one(
    tested: OnnxSide, feed: Arrays, given: dict[str, Array], value: str, found: dict[str, Array], why: dict[str, str]
) -> None:
    try:
        found |= tested.compute(feed, given, [value])
    except Exception as error:
        why[value] = reason(error)


def _step(levels: Levels, key: Key, known: dict[Key, Array], found: Array, allowed: float, share: float) -> Local:
    """Compare integers as `steps.py` does: each must be a rounding of what the reference read, with its own step."""
    integers = known[key]
    if integers.shape != found.shape:
        return Local(key, math.inf, allowed, False, integers, found)
    difference = StepDifference(key.name, share=share)
    call = Quantized(known[Key(key.name, "read", key.call)], integers)
    with np.errstate(all="ignore"):
        difference.add(call, found, levels, Tolerance(allowed, ""))
    return Local(key, difference.beyond, allowed, difference.within, integers, found)


def _layers_alone(
    reference: Side, tested: TorchSide, feed: Arrays, points: Points, part: slice, budget: int
) -> Iterator[Local]:
    there = set(points.keys)
    outputs = [
        (key, Key(key.name, "input", key.call), size)
        for key, size in zip(points.keys[part], points.sizes[part], strict=True)
        if key.role in ("output", "product") and Key(key.name, "input", key.call) in there
    ]
    for group in groups([None if size is None else 2 * size for _, _, size in outputs], budget):
        keys = [outputs[index][:2] for index in group]
        known = reference.values(feed, [key for pair in keys for key in pair])
        for key, given in keys:
            found = tested.alone(key, known[given])
            if found is not None:
                error, allowed = relative_error(known[key], found), EPS32 * OTHER_NODES
                yield Local(key, error, allowed, error <= allowed, known[key], found)


class _Allowance:
    """How far a segment's floats may be off: what its layers sum up, and not less than the whole network's sums.

    A segment that is off by less than the network may be is not what made the outputs differ.
    """

    def __init__(self, tested: OnnxSide) -> None:
        self._graph, self._lengths = tested.graph, tested.lengths
        self._network = EPS32 * sum(math.sqrt(length) for length in self._lengths.values())
        self._precision, tensors = half_tensors(tested.path)
        if tensors:
            self._network = in_half(Tolerance(self._network, ""), tensors, self._precision).relative

    def __call__(self, nodes: Sequence[NodeProto]) -> float:
        """Return what is allowed for a segment of those nodes."""
        relative = 0.0
        computing = [node for node in nodes if any(self._graph.is_varying(name) for name in node.output)]
        for node in computing:
            length = self._lengths.get(self._graph.layer_of(node) or "")
            relative += EPS32 * (OTHER_NODES if length is None else math.sqrt(length))
        if self._precision != "fp32":
            relative = in_half(Tolerance(relative, ""), len(computing) + 1, self._precision).relative
        return max(relative, self._network)
