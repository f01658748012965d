"""The intervals of one metric of the ONNX model, and what they tell about its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slope_compile.train.validation import Answers, Classified, Detected
from slope_compile.verify.metric import average_precision, bootstrap
from slope_compile.verify.metric.bootstrap import Interval


@dataclass(frozen=True)
class Intervals:
    """Of one metric.

    Args:
        own: Of the ONNX model's metric itself.
        drops: Of its relative drop, by whose metric it is compared with.
        missing: Why some drop has none; empty where all have one.
    """

    own: Interval
    drops: Mapping[str, Interval] = field(default_factory=dict)
    missing: str = ""


def measured(metric: str, answers: Answers) -> float:
    """Return a metric over the images as they are."""
    if isinstance(answers, Classified):
        return float(answers.right.mean())
    return average_precision.plain(answers, metric.removesuffix("_map"))


def intervals(metric: str, onnx: Answers, references: Mapping[str, Answers], missing: str = "") -> Intervals:
    """Return the intervals of one metric.

    Args:
        metric: `accuracy`, `mask_map` or `box_map`.
        onnx: What the ONNX model answered.
        references: What those answered that it is compared with, to the same items: whose -> answers.
        missing: Why a reference is not among them.
    """
    if isinstance(onnx, Classified):
        same = {whose: one for whose, one in references.items() if isinstance(one, Classified)}
        own, found = _of_accuracy(onnx, same)
    else:
        own, found = _of_precision(metric, onnx, {w: one for w, one in references.items() if isinstance(one, Detected)})
    zero = [whose for whose in references if whose not in found]
    return Intervals(own, found, missing or "; ".join(f"{whose} has nothing to lose" for whose in zero))


def _of_accuracy(onnx: Classified, references: Mapping[str, Classified]) -> tuple[Interval, dict[str, Interval]]:
    found = {whose: bootstrap.drop_interval(one.right, onnx.right) for whose, one in references.items()}
    drops = {whose: interval for whose, interval in found.items() if interval is not None}
    return bootstrap.accuracy_interval(onnx.right), drops


def _of_precision(
    metric: str, onnx: Detected, references: Mapping[str, Detected]
) -> tuple[Interval, dict[str, Interval]]:
    kind = metric.removesuffix("_map")
    drawn, tested = average_precision.resampled({**references, "": onnx}, kind), measured(metric, onnx)
    drops = {}
    for whose, one in references.items():
        if known := measured(metric, one):
            drop = (known - tested) / known
            drops[whose] = average_precision.drop_interval(drawn[whose], drawn[""], drop, onnx.objects)
    return average_precision.metric_interval(drawn[""], tested, onnx.objects), drops
