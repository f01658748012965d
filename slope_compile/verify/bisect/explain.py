"""Why a parity check failed: the first layer that differs, how, probably why, and a reproducer of it alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slope_compile.errors import StorageError
from slope_compile.verify.bisect.causes import likely_cause
from slope_compile.verify.bisect.distance import relative_error, statistics
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.points import Key, Side
from slope_compile.verify.bisect.reproducer import Reproducer, write_layer, write_reproducer
from slope_compile.verify.bisect.search import (
    BUDGET,
    Local,
    Points,
    bisect,
    common_points,
    first_samples,
    locally,
)
from slope_compile.verify.bisect.torch_side import TorchSide
from slope_compile.verify.chain.runners import Array, Arrays
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import NotCheckedError, reason, significant

FUSED = (
    "fused at lower precision: the difference vanishes when the layers' outputs are marked, because ONNX Runtime's "
    "optimizer then leaves the operators as they are"
)
ADDS_UP = "no layer alone is beyond its tolerance: rounding adds up, and this layer adds most"


@dataclass(frozen=True)
class Divergence:
    """The first layer that differs.

    Args:
        layer: `layer1.0.conv1`; `between A and B` for what lies between two layers; `""` where no layer is at fault.
        operator: Its operators.
        cause: The likely cause, in words.
        error: max|difference| / max|reference| of its output, given the reference's own inputs.
        allowed: How much of it floats explain.
        reference: Statistics of the reference's tensor (`statistics`).
        tested: Those of the tested side's.
        reproducer: Where the sub-model and its input were written, if they were.
    """

    layer: str
    operator: str
    cause: str
    error: float
    allowed: float
    reference: dict[str, Any] = field(default_factory=dict)
    tested: dict[str, Any] = field(default_factory=dict)
    reproducer: Reproducer | None = None

    def figures(self) -> dict[str, Any]:
        """Return what goes into the check's figures as `diverges`."""
        return {
            "layer": self.layer,
            "operator": self.operator,
            "cause": self.cause,
            "error": significant(self.error),
            "allowed": significant(self.allowed),
            "reference": self.reference,
            "tested": self.tested,
            "reproducer": None if self.reproducer is None else self.reproducer.folder,
            "command": None if self.reproducer is None else self.reproducer.command,
        }

    def __str__(self) -> str:
        if not self.layer:
            return self.cause
        where = f"first differs {'' if self.layer.startswith('between') else 'at '}{self.layer} ({self.operator})"
        far = f"off by {self.error:.2g} of the largest, allowed {self.allowed:.2g}"
        line = f"{where}: {far}; likely cause: {self.cause}"
        made = self.reproducer
        return line if made is None else f"{line}; replay in {made.folder}: {made.command}"


def explain(
    check: str,
    reference: Side,
    tested: Side,
    feed: Arrays,
    allowed: Tolerance,
    out: Path | None,
    budget: int = BUDGET,
) -> Divergence | None:
    """Find the first layer that differs, say why, and write a reproducer.

    Args:
        check: The check that failed, such as `parity.onnx`.
        reference: The side that is right.
        tested: The side that differs.
        feed: Inputs for which their outputs differ; the sample that differs most is looked at.
        allowed: How far the outputs may be off.
        out: The verification's folder, where `reproducer/CHECK/` goes; None: nothing is written.
        budget: Bytes of tensors held of each side at a time.

    Returns:
        The divergence; None if nothing differs on the way.

    Raises:
        NotCheckedError: If one of the sides cannot be run with tensors marked, with the reason.
        StorageError: If `out` cannot be written.
    """
    try:
        feed = _worst_sample(reference, tested, feed)
        points = common_points(reference, tested, feed)
        found, worst = _culprit(reference, tested, feed, points, allowed, budget)
        if found is None:
            return _without_culprit(reference, tested, feed, points, allowed, worst)
        return _told(check, reference, tested, feed, points, found, out)
    except (NotCheckedError, StorageError):
        raise
    except Exception as error:  # a damaged file may raise anything in onnx, ONNX Runtime or torch, as in `attempt`
        raise NotCheckedError(f"where it first differs cannot be told: {reason(error)}") from error


def _culprit(
    reference: Side, tested: Side, feed: Arrays, points: Points, allowed: Tolerance, budget: int
) -> tuple[Local | None, Local | None]:
    """Return the first tensor that is not reproduced, if any; and the one that comes nearest to that."""
    end = len(points.keys)
    if not points.quantized:
        end = 1 + bisect(reference, tested, feed, points.keys, allowed.relative)
    worst: Local | None = None
    for start, stop in ((0, end), (end, len(points.keys))):  # past the bisected end only if the prefix is sound
        for local in locally(reference, tested, feed, points, slice(start, stop), budget):
            if not local.within:
                return local, local
            if worst is None or local.error / local.allowed > worst.error / worst.allowed:
                worst = local
    return None, worst


def _without_culprit(
    reference: Side, tested: Side, feed: Arrays, points: Points, allowed: Tolerance, worst: Local | None
) -> Divergence | None:
    """Return what it means that each layer alone is right."""
    expected = reference.results(feed)
    error = _apart(expected, tested.results(feed))
    if error <= allowed.relative:
        return None
    if isinstance(tested, OnnxSide) and tested.optimized:
        marked = _apart(expected, tested.results_when_marked(feed, points.keys))
        if marked <= allowed.relative:
            return Divergence("", "", FUSED, error, allowed.relative)
    if worst is None:
        return None
    layer, operator = _place(tested, worst.key, points)
    return Divergence(
        layer, operator, ADDS_UP, worst.error, worst.allowed, statistics(worst.reference), statistics(worst.tested)
    )


def _told(
    check: str, reference: Side, tested: Side, feed: Arrays, points: Points, found: Local, out: Path | None
) -> Divergence:
    layer, operator = _place(tested, found.key, points)
    cause = likely_cause(reference, tested, feed, points, found)
    reproducer = None
    if out is not None and isinstance(tested, OnnxSide):
        reproducer = write_reproducer(out, check, reference, tested, feed, points, found)
    elif out is not None and isinstance(tested, TorchSide):
        reproducer = write_layer(out, check, reference, tested, feed, found)
    before, after = statistics(found.reference), statistics(found.tested)
    return Divergence(
        cause.layer or layer, operator, cause.words, found.error, found.allowed, before, after, reproducer
    )


def _place(tested: Side, key: Key, points: Points) -> tuple[str, str]:
    """Return the layer and operators that compute a tensor from the common tensors before it."""
    if not isinstance(tested, OnnxSide):
        return key.name, tested.operator(key.name)
    graph = tested.graph
    begins, nodes = graph.segment(graph.keys[key], {graph.keys[other] for other in points.keys})
    computing = [node for node in nodes if any(graph.is_varying(name) for name in node.output)]
    operators = ", ".join(dict.fromkeys(node.op_type for node in computing))
    if key.role in ("output", "product", "quantizer"):
        return str(key), operators
    layers = [layer for node in computing if (layer := graph.layer_of(node)) is not None]
    if len(layers) == 1:
        return layers[0], operators
    if len(computing) == 1 and computing[0].name:
        return f"{computing[0].name}", operators
    names = {graph.keys[other]: str(other) for other in points.keys}
    return f"between {_joined(names.get(begin, begin) for begin in begins)} and {key}", operators


def _worst_sample(reference: Side, tested: Side, feed: Arrays) -> Arrays:
    """Return the one sample whose outputs differ most, where a batch may have any size."""
    samples = next(iter(feed.values())).shape[0]
    if not (reference.free_batch and tested.free_batch) or samples < 2:
        return feed
    expected = reference.results(feed)
    try:
        found = tested.results(feed)
    except Exception:  # ONNX Runtime refuses it somewhere on the way: any sample shows where
        return first_samples(reference, tested, feed, 1)
    errors = np.zeros(samples)
    for a, b in zip(expected, found, strict=False):
        if a.shape != b.shape or a.shape[:1] != (samples,):
            return first_samples(reference, tested, feed, 1)
        errors = np.maximum(errors, [relative_error(x, y) for x, y in zip(a, b, strict=True)])
    worst = int(np.argmax(errors))
    return {name: array[worst : worst + 1] for name, array in feed.items()}


def _apart(expected: Iterable[Array], found: Iterable[Array]) -> float:
    return max((relative_error(a, b) for a, b in zip(expected, found, strict=False)), default=0.0)


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names)) or "the inputs"
