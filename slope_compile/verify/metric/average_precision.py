"""COCO's mean average precision for any choice of the images, from what its evaluation matched in each.

Which detection finds which object is settled within an image, so that a resample of the images needs no new matching:
an image drawn twice counts twice, its objects and its detections. Legend: b - resamples, n - images, d - detections of
a class, t - those of them that are right, r - COCO's 101 recalls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.train.validation import THRESHOLDS, Detected, Matches, Objects
from slope_compile.verify.metric.bootstrap import SEED, Interval, of_values, unseen

# Each resample is an evaluation of its own. With 1,000 an end of the interval is off by about 4 % of its distance from
# the figure (one standard error of a 2.5 % quantile of a normal distribution), and COCO's 5,000 images take seconds.
RESAMPLES = 1000
AT_ONCE = 4_000_000  # numbers in an array of one step

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float64]


@cache
def recalls() -> Floats:
    """Return COCO's 101 recalls as torchmetrics has them: the last bits decide whether 11 of 20 objects reach 0.55."""
    from torchmetrics.detection import MeanAveragePrecision

    return np.array(MeanAveragePrecision().rec_thresholds)


def mean_average_precision(found: Detected, kind: str, weights: Ints) -> Floats:
    """Return COCO's mean average precision over IoU 0.50 to 0.95 for each row of weights.

    Args:
        found: What was matched.
        kind: `box` or `mask`.
        weights: How often each image counts, [b, n].

    Returns:
        [b]; NaN where no image with an object is drawn.
    """
    classes = np.unique(found.objects.label)
    total, defined = np.zeros(len(weights)), np.zeros(len(weights))
    for label in classes:
        for rows in _chunks(len(weights), int(np.count_nonzero(found.kinds[kind].label == label))):
            there, precision = _of_class(found.objects, found.kinds[kind], label, weights[rows])
            total[rows] += precision
            defined[rows] += there
    return np.asarray(np.divide(total, defined, out=np.full(len(weights), np.nan), where=defined > 0))


def plain(found: Detected, kind: str) -> float:
    """Return the mean average precision over the images as they are."""
    return float(mean_average_precision(found, kind, np.ones((1, found.items), np.int32))[0])


def resampled(found: Mapping[str, Detected], kind: str) -> dict[str, Floats]:
    """Return each model's mean average precision in the same draws of images: name -> [RESAMPLES]."""
    items = next(iter(found.values())).items
    drawn = np.random.default_rng(SEED).integers(0, items, (RESAMPLES, items))
    weights = np.stack([np.bincount(row, minlength=items).astype(np.int32) for row in drawn])
    return {name: mean_average_precision(one, kind, weights) for name, one in found.items()}


def metric_interval(values: Floats, value: float, objects: Objects) -> Interval:
    """Return the interval of a model's own figure."""
    rare = unseen(_images(objects))
    return of_values(values).widened(max(value - rare, 0.0), min(value + rare, 1.0))


def drop_interval(reference: Floats, tested: Floats, drop: float, objects: Objects) -> Interval:
    """Return the interval of the relative drop.

    Images that no draw shows may have a share of up to `unseen(n)`; a model that finds nothing in them loses about this
    share. No interval is narrower than that.

    Args:
        reference: The reference's figures, [b].
        tested: The tested model's in the same draws.
        drop: The drop on the images as they are.
        objects: What is to be found.
    """
    drops = np.divide(reference - tested, reference, out=np.zeros(len(reference)), where=reference != 0)
    rare = unseen(_images(objects))
    return of_values(drops).widened(drop - rare, drop + rare)


def _images(objects: Objects) -> int:
    """Return how many images hold an object."""
    return len(np.unique(objects.image))


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(AT_ONCE // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def _of_class(objects: Objects, matches: Matches, label: Any, weights: Ints) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Return in which rows a class has objects, and its mean precision over thresholds and recalls there, [b]."""
    mine = objects.label == label
    there = weights[:, objects.image[mine]] @ objects.count[mine]  # [b]
    chosen = np.flatnonzero(matches.label == label)
    chosen = chosen[np.argsort(-matches.score[chosen], kind="stable")]
    drawn = weights[:, matches.image[chosen]]  # [b, d]
    counted: dict[bytes, Ints] = {}  # detections so far; which are left out is mostly alike at all thresholds
    total = np.zeros(len(weights))
    for bit in range(THRESHOLDS):
        ignored = matches.ignored[chosen] >> bit & 1
        if (key := ignored.tobytes()) not in counted:
            counted[key] = np.cumsum(drawn * (1 - ignored), axis=1, dtype=drawn.dtype)
        right = np.flatnonzero(matches.matched[chosen] >> bit & 1)
        total += _precision(np.cumsum(drawn[:, right], axis=1, dtype=drawn.dtype), counted[key][:, right], there)
    return there > 0, np.where(there > 0, total / THRESHOLDS, 0.0)


def _precision(found: Ints, counted: Ints, there: Ints) -> Floats:
    """Return the mean over recalls of the best precision from there on, [b].

    Only right detections are looked at: recall rises at these alone, and precision falls in between.

    Args:
        found: Right detections so far, [b, t].
        counted: Detections so far, [b, t].
        there: Objects, [b].
    """
    precision = found / (counted + np.spacing(1))  # COCO's guard against 0 / 0
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(recalls(), found / np.maximum(there, 1)[:, None], side="right")
    return np.asarray((best * np.diff(reached, axis=1, prepend=0)).sum(axis=1) / len(recalls()))
