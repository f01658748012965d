"""How often the interval of verify's metric check holds the truth: many validation sets drawn from a known population.

    OMP_NUM_THREADS=1 python -m benchmarks.bootstrap --out benchmarks/results/bootstrap.json

For an accuracy the population is four numbers: the shares of images that both models, one of them or none has right.
For a mean average precision it is 20,000 made-up images, whose own figures are the truth. `plain` is the percentile
interval of the same draws without half an image in each cell and without the bound on what no image showed. Takes one
core about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile import machine
from slope_compile.artifacts import write_atomically
from slope_compile.train.validation import THRESHOLDS, Detected, Matches, Objects
from slope_compile.verify.metric import average_precision, bootstrap
from slope_compile.verify.metric.bootstrap import Interval

ITEMS = (100, 359, 1000, 10_000)
ACCURACIES = (0.7, 0.95, 0.99, 0.999)  # of the reference
# Share of images that turn wrong, share that turn right.
CHANGES = ((0.0, 0.0), (0.0005, 0.0), (0.002, 0.001), (0.005, 0.005), (0.01, 0.0), (0.02, 0.01), (0.05, 0.04))
IMAGES = (50, 200)  # of a detector's validation set
POPULATION, CLASSES = 20_000, 5
PARTIAL = (0.0, 0.01, 0.05)  # share of objects that the tested detector loses; three times as many it finds less well

Ints = npt.NDArray[np.int64]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=400, help="validation sets drawn for each accuracy")
    parser.add_argument("--detector-sets", type=int, default=100, help="the same for each mean average precision")
    parser.add_argument("--items", type=int, nargs="+", default=ITEMS)
    parser.add_argument("--images", type=int, nargs="*", default=IMAGES)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    document = {
        "command": " ".join(["python -m benchmarks.bootstrap", *(sys.argv[1:] if arguments is None else arguments)]),
        "sets": options.sets,
        "detector_sets": options.detector_sets,
        "accuracy": [accuracy(n, a, options.sets) for n in options.items for a in ACCURACIES],
        "drop": [
            drop(n, a, lost, won, options.sets)
            for n in options.items
            for a in ACCURACIES
            for lost, won in CHANGES
            if won <= 1 - a
        ],
        "map_drop": [map_drop(n, lost, options.detector_sets) for n in options.images for lost in PARTIAL],
        "versions": machine.versions(),
        "machine": {key: value for key, value in machine.machine().items() if key in ("cores", "gpus")},
    }
    write_atomically(options.out, json.dumps(document, indent=1) + "\n")


def accuracy(items: int, share: float, sets: int) -> dict[str, Any]:
    """Return how often the interval of an accuracy holds it."""
    rng = np.random.default_rng(0)
    found = [_accuracy(items, int(hits)) for hits in rng.binomial(items, share, size=sets)]
    plain = [_plain_accuracy(items, int(hits)) for hits in np.random.default_rng(0).binomial(items, share, size=sets)]
    return {"items": items, "accuracy": share, **_coverage(found, share), "plain": _coverage(plain, share)["coverage"]}


def drop(items: int, share: float, lost: float, won: float, sets: int) -> dict[str, Any]:
    """Return how often the interval of an accuracy's relative drop holds it."""
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(items, [share - lost, lost, won, 1 - share - won], size=sets)
    cells = [tuple(int(count) for count in row) for row in drawn]
    truth = (lost - won) / share
    row = {"items": items, "accuracy": share, "lost": lost, "won": won, "drop": round(truth, 6)}
    plain = _coverage([_plain_drop(*cell) for cell in cells], truth)
    return {**row, **_coverage([_drop(*cell) for cell in cells], truth), "plain": plain["coverage"]}


def map_drop(images: int, lost: float, sets: int) -> dict[str, Any]:
    """Return how often the interval of a mean average precision's relative drop holds it."""
    reference, tested = population(lost)
    whole = [average_precision.plain(one, "box") for one in (reference, tested)]
    truth, rng, found, plain = (whole[0] - whole[1]) / whole[0], np.random.default_rng(0), [], []
    for _ in range(sets):
        chosen = rng.integers(0, POPULATION, images)
        pair = {"reference": choose(reference, chosen), "tested": choose(tested, chosen)}
        drawn = average_precision.resampled(pair, "box")
        here = [average_precision.plain(one, "box") for one in pair.values()]
        measured, objects = (here[0] - here[1]) / here[0], pair["tested"].objects
        found.append(average_precision.drop_interval(drawn["reference"], drawn["tested"], measured, objects))
        plain.append(bootstrap.of_values((drawn["reference"] - drawn["tested"]) / drawn["reference"]))
    row = {"images": images, "lost": lost, "map": round(whole[0], 4), "drop": round(truth, 6)}
    return {**row, **_coverage(found, truth), "plain": _coverage(plain, truth)["coverage"]}


def population(lost: float) -> tuple[Detected, Detected]:
    """Return what two detectors find in made-up images with one to four objects of five classes each."""
    rng = np.random.default_rng(1)
    count = rng.integers(1, 5, POPULATION)
    image = np.repeat(np.arange(POPULATION), count)
    label = rng.choice(CLASSES, len(image), p=[0.4, 0.3, 0.15, 0.1, 0.05])
    # Up to which IoU threshold an object counts as found; 0: not at all.
    level = np.minimum(rng.integers(0, 2 * THRESHOLDS, len(image)), THRESHOLDS) * (rng.random(len(image)) < 0.9)
    worse = level - rng.integers(0, 3, len(level)) * (rng.random(len(level)) < 3 * lost)
    worse = np.where(rng.random(len(level)) < lost, 0, np.maximum(worse, 0))
    extra = rng.integers(0, POPULATION, len(image) // 2)  # detections of nothing
    extra_label = rng.integers(0, CLASSES, len(extra))
    surer = np.concatenate([rng.beta(5, 2, len(image)), rng.beta(2, 5, len(extra))])
    keys, objects = np.unique(np.stack([label, image]), axis=1, return_counts=True)
    truth = Objects(*(part.astype(np.int32) for part in (keys[1], keys[0], objects)))

    def found(levels: Ints) -> Detected:
        matched = np.concatenate([(1 << levels) - 1, np.zeros(len(extra), np.int64)])
        return _detected(
            POPULATION, truth, np.concatenate([image, extra]), np.concatenate([label, extra_label]), surer, matched
        )

    return found(level), found(worse)


def choose(whole: Detected, images: Ints) -> Detected:
    """Return a validation set of some images of a population, one drawn twice being two images."""
    objects, matches = whole.objects, whole.kinds["box"]
    rows, image = _rows(objects.image, images)
    order = np.lexsort((image, objects.label[rows]))
    truth = Objects(image[order].astype(np.int32), objects.label[rows][order], objects.count[rows][order])
    rows, image = _rows(matches.image, images)
    return _detected(len(images), truth, image, matches.label[rows], matches.score[rows], matches.matched[rows])


def _rows(of: npt.NDArray[np.int32], images: Ints) -> tuple[Ints, Ints]:
    """Return the rows that belong to the images chosen, and the new number of each row's image."""
    order = np.argsort(of, kind="stable")
    first, last = (np.searchsorted(of[order], images, side=side) for side in ("left", "right"))
    rows = np.concatenate([order[a:b] for a, b in zip(first, last, strict=True)])
    return rows, np.repeat(np.arange(len(images)), last - first)


def _detected(items: int, truth: Objects, image: Any, label: Any, score: Any, matched: Any) -> Detected:
    order = np.lexsort((image, label))
    types = (np.int32, np.int32, np.float32, np.int16, np.int16)
    columns = zip((image, label, score, matched, np.zeros_like(matched)), types, strict=True)
    found = Matches(*(column[order].astype(dtype) for column, dtype in columns))
    return Detected(items, truth, {"box": found})


def _coverage(intervals: Sequence[Interval], truth: float) -> dict[str, float]:
    held = [interval.low - 1e-12 <= truth <= interval.high + 1e-12 for interval in intervals]
    width = np.mean([interval.high - interval.low for interval in intervals])
    return {"coverage": round(float(np.mean(held)), 4), "width": round(float(width), 6)}


@cache
def _accuracy(items: int, hits: int) -> Interval:
    return bootstrap.accuracy_interval(np.arange(items) < hits)


@cache
def _drop(both: int, lost: int, won: int, neither: int) -> Interval:
    cells = np.repeat(np.arange(4), (both, lost, won, neither))
    found = bootstrap.drop_interval(cells < 2, (cells == 0) | (cells == 2))
    assert found is not None
    return found


@cache
def _plain_accuracy(items: int, hits: int) -> Interval:
    drawn = np.random.default_rng(bootstrap.SEED).binomial(items, hits / items, size=bootstrap.RESAMPLES)
    return bootstrap.of_values(drawn / items)


@cache
def _plain_drop(*cells: int) -> Interval:
    items = sum(cells)
    drawn = np.random.default_rng(bootstrap.SEED).multinomial(items, np.array(cells) / items, size=bootstrap.RESAMPLES)
    return bootstrap.of_values((drawn[:, 1] - drawn[:, 2]) / (drawn[:, 0] + drawn[:, 1]))


if __name__ == "__main__":
    main()
