"""Quantized activations of the trained model and of ONNX Runtime, integer by integer, one segment after the other.

Letters: x - what the trained model quantizes, s - step, q - the integer that the file makes, e - the float tolerance of
`tolerance.py`, relative to the largest |x| of the tensor.

Each segment of the file, from quantizers to the next ones (`segments.py`), is given the integers of the trained model.
So it computes x but for errors of floats, and rounds it to one of the integers that lie that close:

    |clip(x / s, -Qn, Qp) - q| <= 1/2 + d,    d = e * max|x| / s          for every integer

Since the trained integer is a rounding of x too, both are at most 1 + d apart: one step, while d < 1. And they differ
only where x lies within d of the middle between two levels, so the share of those elements is what may be off:

    largest step difference  <= floor(1 + d)
    share off                <= share of x / s within d of a midpoint

The outputs agree as those of a network without quantizers do, within e. The whole file is its segments one after
the other, so both together say that it computes what was trained; from end to end the two may still drift apart, one
rounding setting off others, which is measured and not judged.

Where a detector has chosen before (the best proposals, those that overlap too much), a last bit may turn the choice:
there 1 integer in 100 may be another one, as 1 detection in 100 may (`detections.py`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_compile.qdq.activations import StoredQuantizer, stored_quantizers
from slope_compile.qdq.checks import Finding
from slope_compile.qdq.sites import Levels
from slope_compile.qdq.tensors import load_graph
from slope_compile.verify.chain.runners import Array, Arrays, TorchRunner, infer
from slope_compile.verify.parity.detections import FLOAT_SHARE
from slope_compile.verify.parity.outputs import Difference, compare
from slope_compile.verify.parity.segments import behind_choices, cut_session, made
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import significant

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn

    from slope_compile.compression.activations import ActivationQuantizer

CHUNK = 4  # samples at a time: what all quantizers read and make is held at once
Calls = Mapping[str, Sequence["Quantized"]]  # quantizer -> its calls


@dataclass(frozen=True)
class Quantized:
    """One call of a trained quantizer: what it read, float32, and the integers that it made, INT8."""

    read: Array
    integers: Array


@dataclass
class StepDifference:
    """How the integers of one quantizer differ.

    Args:
        name: The quantizer, `layer1.0.conv1.input`.
        elements: How many were compared.
        different: How many differ.
        off_by_one: How many of them by one step.
        largest: The largest difference, in steps.
        near: How many values lie so near to the middle between two levels that their integers may differ.
        reach: The largest difference that may be, in steps.
        outside: How many are no rounding of the trained value, whatever floats allow.
        levels: By how many levels they miss it, at most; 0 where all are within half a level.
        beyond: The same in units of max|x|, of which the tolerance e allows so much.
        share: The share that may be outside: 0, but behind choices.
    """

    name: str
    elements: int = 0
    different: int = 0
    off_by_one: int = 0
    largest: int = 0
    near: int = 0
    reach: int = 1
    outside: int = 0
    levels: float = 0.0
    beyond: float = 0.0
    share: float = 0.0

    @property
    def within(self) -> bool:
        """Whether so few are off as may be, by as many steps as may be."""
        few = self.share * self.elements
        return self.outside <= few and self.different <= self.near + few and (self.largest <= self.reach or few > 0)

    def add(self, trained: Quantized, found: Array, quantizer: Levels, allowed: Tolerance) -> None:
        """Count the integers of one call."""
        x = trained.read.astype(np.float64) / quantizer.scale
        reach = float(np.abs(x).max(initial=0.0))  # max|x| / s
        slack = allowed.relative * reach
        clipped = np.clip(x, quantizer.low, quantizer.high)
        missed = np.abs(clipped - found) - 0.5
        steps = np.abs(trained.integers.astype(np.int64) - found)
        self.elements += missed.size
        self.different += int(np.count_nonzero(steps))
        self.off_by_one += int(np.count_nonzero(steps == 1))
        self.largest = max(self.largest, int(steps.max(initial=0)))
        self.near += int(np.count_nonzero(_from_midpoint(x, quantizer) <= slack))
        self.reach = max(self.reach, int(1 + slack) if math.isfinite(slack) else 1)
        self.outside += int(np.count_nonzero(~(missed <= slack)))  # NaN is outside too
        worst = float(missed.max(initial=0.0))
        self.levels = max(self.levels, worst)
        self.beyond = max(self.beyond, worst / reach if reach else worst)

    def told(self, whose: str) -> str:
        """Return what is wrong, in words; `whose` integers the found ones should be."""
        if self.outside > self.share * self.elements:
            wrong = f"{self.outside} of {self.elements} integers are no rounding of {whose}"
        else:
            wrong = f"{self.different} of {self.elements} integers are not {whose}, where {self.near} may be others"
        return f"{self.name}: {wrong}, by up to {self.largest} steps, off by up to {self.levels:.2g} levels"


def step_figures(found: Sequence[StepDifference]) -> dict[str, Any]:
    """Return the figures of all quantizers together: shares of all integers, and the largest difference in steps."""
    elements = max(sum(one.elements for one in found), 1)
    return {
        "step_share": significant(sum(one.different for one in found) / elements),
        "step_off_by_one": significant(sum(one.off_by_one for one in found) / elements),
        "step_off_allowed": significant(sum(one.near for one in found) / elements),
        "step_largest": max((one.largest for one in found if not one.share), default=0),
        "step_largest_allowed": max((one.reach for one in found if not one.share), default=1),
        "step_beyond": significant(max((one.beyond for one in found if not one.share), default=0.0)),
    }


def _from_midpoint(x: Array, levels: Levels) -> Array:
    """Return how far each x / s is from the nearest middle between two levels, in steps."""
    middle = np.clip(np.floor(x) + 0.5, levels.low + 0.5, levels.high - 0.5)
    return np.asarray(np.abs(x - middle))


def step_problems(
    path: Path, model: nn.Module, twin: ort.InferenceSession, feeds: Sequence[Arrays], allowed: Tolerance,
    figures: dict[str, Any],
) -> list[str] | None:  # fmt: skip
    """Return what is wrong with the segments of a file, and note what was measured in `figures`; None: no quantizers.

    Args:
        path: The ONNX file.
        model: The trained model; its mode is left as it was.
        twin: The file in ONNX Runtime, as it is.
        feeds: Inputs, one mapping a feed.
        allowed: The float tolerance e.
        figures: Gets `quantizers`, those of `step_figures`, and `segment_relative` (of the outputs).
    """
    from slope_compile.compression.activations import trained_quantizers

    stored, trained = stored_quantizers(path), trained_quantizers(model)
    if not stored and not trained:
        return None
    found, outputs, problems = compare_steps(path, model, twin, feeds, allowed)
    if found:
        figures |= {"quantizers": len(found), **step_figures(found)}
    figures |= {"segment_tolerance": significant(allowed.relative), "segment_relative": significant(outputs.relative)}
    problems += [one.told("what was trained") for one in found if not one.within]
    if not outputs.within:
        problems.append(f"given the trained integers, ONNX Runtime {outputs.told(allowed)}")
    return problems


def quantizer_findings(stored: Sequence[StoredQuantizer], model: nn.Module) -> Iterator[Finding]:
    """Yield where a file's quantizers of activations are not the trained ones, bit for bit."""
    from slope_compile.compression.activations import trained_quantizers

    trained = trained_quantizers(model)
    for one in stored:
        expected = trained.get(one.name)
        if expected is None:
            yield Finding(one.name, "extra", "quantized in the file, but not in the trained model")
            continue
        if np.float32(one.scale).tobytes() != np.float32(expected.scale).tobytes():
            yield Finding(one.name, "step", f"is {one.scale!r} in the file and {expected.scale!r} in the trained model")
        # A higher low end is a Relu of the model's own: nothing below it is left to clip.
        if one.zero_point or one.high != expected.high or one.low < expected.low:
            told = f"levels {one.low} to {one.high} around {one.zero_point}, trained {expected.low} to {expected.high}"
            yield Finding(one.name, "range", told)


def compare_steps(
    path: Path, model: nn.Module, twin: ort.InferenceSession, feeds: Sequence[Arrays], allowed: Tolerance
) -> tuple[list[StepDifference], Difference, list[str]]:
    """Compare every segment of a file, given the trained integers, with the trained model.

    Returns:
        The differences of integers; that of the outputs; and which quantizers are not called alike, in words: those
        stay as they are in the file.
    """
    from slope_compile.compression.activations import trained_quantizers

    stored, trained = stored_quantizers(path), trained_quantizers(model)
    parts = [part for whole in feeds for part in _chunks(whole)]
    chosen = behind_choices(load_graph(path), [quantizer.output for quantizer in stored])
    found: dict[str, StepDifference] = {}
    problems: dict[str, None] = {}
    session: ort.InferenceSession | None = None
    reference, tested = [], []
    runner = TorchRunner(model, twin)
    for part in parts:
        with _recorded(model) as calls:
            reference += infer(runner, [part])
        counted = _without_again(stored, calls)
        problems |= dict.fromkeys(_called_otherwise(counted, calls))
        given = dict(_in_file_order(counted, calls))
        if session is None:
            session = cut_session(path, [quantizer.output for quantizer in given])
        inputs = {quantizer.output: call.integers for quantizer, call in given.items()}
        names = [value.name for value in session.get_outputs()]
        answer = dict(zip(names, session.run(names, {**part, **inputs}), strict=True))
        tested.append({name: answer[name] for name in reference[-1]})
        for quantizer, call in given.items():
            integers = answer[made(quantizer.output)]
            if integers.shape != call.integers.shape:
                problems[f"{quantizer.name}: shape {integers.shape}, trained {call.integers.shape}"] = None
                continue
            share = FLOAT_SHARE if quantizer.output in chosen else 0.0
            difference = found.setdefault(quantizer.name, StepDifference(quantizer.name, share=share))
            difference.add(call, integers, trained[quantizer.name], allowed)
    return list(found.values()), compare(reference, tested, allowed), list(problems)


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, list[Quantized]]]:
    """Keep what each quantizer of a model reads and makes while it runs: name -> its calls."""
    from slope_compile.compression.activations import activation_quantizers
    from slope_compile.compression.lsq import effective_step

    calls: dict[str, list[Quantized]] = {}
    handles = []

    def keep(name: str, quantizer: ActivationQuantizer) -> Any:
        read: list[Any] = []

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            # Layers that share a quantizer hand it the same tensor: the file quantizes that once.
            if not any(arguments[0] is other for other in read):
                read.append(arguments[0])
                integers = (output / effective_step(quantizer.step)).round().cpu().numpy().astype(np.int8)
                calls.setdefault(name, []).append(Quantized(arguments[0].float().cpu().numpy(), integers))

        return hook

    try:
        for name, quantizer in activation_quantizers(model):
            handles.append(quantizer.register_forward_hook(keep(name, quantizer)))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _without_again(stored: Sequence[StoredQuantizer], calls: Calls) -> list[StoredQuantizer]:
    """Return one of each run of pairs that change no number: the last, whose tensor is the trained model's.

    ONNX Runtime moves a pair before a MaxPool and leaves it behind it too. Where the trained model calls the quantizer
    as often as the file has it, all stay.
    """
    times, kept = Counter(one.name for one in stored), dict[str, list[StoredQuantizer]]()
    for one in stored:
        runs = kept.setdefault(one.name, [])
        if one.again and runs and times[one.name] != len(calls.get(one.name, ())):
            runs.pop()
        runs.append(one)
    left = {one.output for runs in kept.values() for one in runs}
    return [one for one in stored if one.output in left]


def _called_otherwise(stored: Sequence[StoredQuantizer], calls: Calls) -> Iterator[str]:
    """Yield, in words, the quantizers that are not as often in the file as the trained model calls them."""
    times = Counter(one.name for one in stored)
    for name in dict.fromkeys([*calls, *times]):
        trained = len(calls.get(name, ()))
        if not times[name]:
            yield f"{name}: the trained model quantizes here, the file does not"
        elif trained != times[name]:
            yield f"{name}: quantizes {times[name]} tensors in the file, {trained} in the trained model"


def _in_file_order(stored: Sequence[StoredQuantizer], calls: Calls) -> Iterator[tuple[StoredQuantizer, Quantized]]:
    """Yield each quantizer of the file with the trained call that it stands for, where both are as many."""
    times, seen = Counter(one.name for one in stored), Counter[str]()
    for one in stored:
        if len(calls.get(one.name, ())) == times[one.name]:
            yield one, calls[one.name][seen[one.name]]
            seen[one.name] += 1


def _chunks(feed: Arrays) -> Iterator[Arrays]:
    samples = next(iter(feed.values())).shape[0]
    for start in range(0, samples, CHUNK):
        yield {name: array[start : start + CHUNK] for name, array in feed.items()}
