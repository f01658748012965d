"""What COCO's evaluation matched, image by image: torchmetrics computes its figures from it and drops it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools.cocoeval import COCOeval
from torchmetrics.detection.helpers import CocoBackend

from slope_compile.train.validation import THRESHOLDS, Detected, Matches, Objects

BITS = (1 << np.arange(THRESHOLDS)).astype(np.int16)[:, None]  # of each IoU threshold, [thresholds, 1]


class MatchingBackend(CocoBackend):
    """torchmetrics' way to pycocotools; keeps the evaluations that it starts."""

    def __init__(self) -> None:
        super().__init__("pycocotools")
        self._done: dict[str, COCOeval] = {}

    @property
    def cocoeval(self) -> Any:
        """Return what makes an evaluation."""

        def start(target: Any, predictions: Any, iouType: str) -> COCOeval:
            self._done[iouType] = COCOeval(target, predictions, iouType=iouType)
            return self._done[iouType]

        return start

    def take(self, items: int) -> Detected:
        """Return what was matched in `items` images since the last call, and forget it."""
        evaluations, self._done = self._done, {}
        names = {"bbox": "box", "segm": "mask"}
        found = {names[kind]: _rows(evaluation) for kind, evaluation in sorted(evaluations.items())}
        first = next(iter(found.values()), [])
        return Detected(items, _objects(first), {name: _matches(rows) for name, rows in found.items()})


def _rows(evaluation: COCOeval) -> list[dict[str, Any]]:
    """Return one row for each class and image that has objects or detections, over all sizes; classes outermost."""
    everything = evaluation.params.areaRng[0]
    return [row for row in evaluation.evalImgs if row is not None and row["aRng"] == everything]


def _objects(rows: Sequence[dict[str, Any]]) -> Objects:
    counted = [(row["image_id"], row["category_id"], int(np.count_nonzero(row["gtIgnore"] == 0))) for row in rows]
    columns = np.array([row for row in counted if row[2]], np.int32).reshape(-1, 3).T
    return Objects(*(np.ascontiguousarray(column) for column in columns))


def _matches(rows: Sequence[dict[str, Any]]) -> Matches:
    lengths = [len(row["dtScores"]) for row in rows]
    found: list[npt.NDArray[np.bool_]] = [row["dtMatches"] > 0 for row in rows]
    left_out: list[npt.NDArray[np.bool_]] = [row["dtIgnore"] > 0 for row in rows]
    empty = np.zeros((THRESHOLDS, 0), dtype=bool)
    matched, ignored = (np.concatenate([empty, *parts], axis=1) for parts in (found, left_out))
    return Matches(
        np.repeat(np.array([row["image_id"] for row in rows], np.int32), lengths),
        np.repeat(np.array([row["category_id"] for row in rows], np.int32), lengths),
        np.concatenate([np.zeros(0, np.float32), *(np.array(row["dtScores"], np.float32) for row in rows)]),
        (BITS * (matched & ~ignored)).sum(axis=0, dtype=np.int16),
        (BITS * ignored).sum(axis=0, dtype=np.int16),
    )
