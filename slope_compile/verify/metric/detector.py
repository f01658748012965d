"""Mean average precision of what the exported detector answers, by the meter that training used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slope_compile.errors import ArtifactError
from slope_compile.export.detection import paste_masks
from slope_compile.metric_names import compared
from slope_compile.train.detection.task import Detection, DetectionBatch, DetectionMeter
from slope_compile.train.loader import batches, in_order
from slope_compile.train.validation import Answers, Detected
from slope_compile.verify.chain.runners import Arrays
from slope_compile.verify.metric.check import NO_RECORD, Batch, MetricTask, References


class DetectionScore:
    """Mean average precision from the graph's boxes, labels, scores and masks; a row whose label is 0 is padding.

    Args:
        masks: Whether masks are measured too.
    """

    def __init__(self, masks: bool) -> None:
        self._names = ("boxes", "labels", "scores", *(("masks",) if masks else ()))
        self._meter = DetectionMeter(masks)

    def update(self, outputs: Arrays, truth: DetectionBatch) -> None:
        """Add a batch.

        Raises:
            ArtifactError: If an output is missing, has not a row an image, or is not finite.
        """
        for name in self._names:
            if name not in outputs or len(outputs[name]) != len(truth):
                raise ArtifactError(f"The model has no output '{name}' with a row an image.", "Export it again.")
            if not np.all(np.isfinite(outputs[name])):
                raise ArtifactError(f"The model's {name} have NaN or infinite values.", "Export it again.")
        height, width = truth.images.shape[2:]
        rows = [{name: outputs[name][index] for name in self._names} for index in range(len(truth))]
        self._meter.update([_found(row, height, width) for row in rows], truth)

    def compute(self) -> Mapping[str, float]:
        """Return `mask_map`, `box_map` and the like."""
        return self._meter.compute()

    def answers(self) -> Detected:
        """Return how each detection was matched."""
        return self._meter.answers()


def _found(row: Arrays, height: int, width: int) -> dict[str, Tensor]:
    """Return one image's detections as torchvision would: without padding, masks pasted."""
    real = row["labels"] > 0
    found = {
        "boxes": torch.from_numpy(row["boxes"][real]).float(),
        "labels": torch.from_numpy(row["labels"][real]).long(),
        "scores": torch.from_numpy(row["scores"][real]).float(),
    }
    if "masks" in row:
        masks = row["masks"][real]
        pasted = paste_masks(masks.reshape(-1, *masks.shape[-2:]), row["boxes"][real], height, width)
        found["masks"] = torch.from_numpy(pasted)[:, None]
    return found


def detection_task(
    validation: Any,
    batch: int,
    budget: float,
    metric: str,
    references: Mapping[str, References],
    record: Mapping[str, Answers] | str = NO_RECORD,
) -> MetricTask:
    """Return what a detector's metrics are measured on and compared with.

    Args:
        validation: The validation split.
        batch: Images at a time.
        budget: Largest allowed relative drop.
        metric: `mask_map` or `box_map`.
        references: Metric -> what training measured.
        record: What both models answered to each item then; or why that is not known.
    """
    masks = metric == "mask_map"
    task = Detection(masks)

    def arrays() -> Iterator[Batch]:
        # No workers: they are forked, and by now ONNX Runtime's threads are running.
        order = in_order(len(validation), batch)
        for items in batches(validation, order, workers=0, pin=False, collate=task.collate):
            yield items.images.numpy(), items

    return MetricTask(
        batches=arrays,
        items=len(validation),
        budget=budget,
        fp32=references[metric].fp32,
        compressed=references[metric].compressed,
        metric=metric,
        score=lambda: DetectionScore(masks),
        others={name: references[name] for name in compared(metric)[1:]},
        record=record,
    )
