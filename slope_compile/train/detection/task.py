"""Detection and segmentation as a task: torchvision's training loss, COCO's mean average precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from slope_compile.errors import DataError, RecipeError
from slope_compile.recipe import Recipe
from slope_compile.train.data import Data
from slope_compile.train.detection.dataset import DetectionDataset, Item, Target
from slope_compile.train.detection.matches import MatchingBackend
from slope_compile.train.detection.models import predicts_masks
from slope_compile.train.validation import Detected

MASK_THRESHOLD = 0.5  # from this probability on a pixel belongs to the object
FIGURES = ("map", "map_50", "map_75")  # over IoU 0.50 to 0.95, at 0.50 and at 0.75


@dataclass(frozen=True)
class DetectionBatch:
    """Images and what is in them.

    Args:
        images: Float32 [n, 3, size, size].
        targets: n targets of `DetectionDataset`.
    """

    images: Tensor
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device, layout: torch.memory_format, non_blocking: bool = True) -> DetectionBatch:
        """Return the batch on a device, its images in a memory layout."""
        images = self.images.to(device, non_blocking=non_blocking, memory_format=layout)
        moved = [{key: t.to(device, non_blocking=non_blocking) for key, t in target.items()} for target in self.targets]
        return DetectionBatch(images, moved)

    def split(self, parts: int) -> list[DetectionBatch]:
        """Return the items, in order, as `parts` batches whose sizes differ by one at most."""
        rest = iter(self.targets)
        return [DetectionBatch(part, [next(rest) for _ in part]) for part in self.images.tensor_split(parts)]

    def pin_memory(self) -> DetectionBatch:
        """Return the batch in page-locked memory."""
        pinned = [{key: t.pin_memory() for key, t in target.items()} for target in self.targets]
        return DetectionBatch(self.images.pin_memory(), pinned)


@dataclass(frozen=True)
class Detection:
    """Detection, with masks or without.

    Args:
        masks: Whether the model predicts masks.
    """

    masks: bool

    @property
    def metric(self) -> str:
        """Name the primary figure."""
        return "mask_map" if self.masks else "box_map"

    def collate(self, items: Sequence[Item]) -> DetectionBatch:
        """Return items as one batch."""
        return DetectionBatch(torch.stack([image for image, _ in items]), [target for _, target in items])

    def loss(self, model: nn.Module, batch: DetectionBatch) -> Tensor:
        """Return the sum of the detector's losses: proposals, classes, boxes, masks."""
        losses: Mapping[str, Tensor] = model(batch.images, batch.targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def predict(self, model: nn.Module, batch: DetectionBatch) -> list[dict[str, Tensor]]:
        """Return boxes, labels, scores and, where the model has them, masks [d, 1, size, size] of each image."""
        found: list[dict[str, Tensor]] = model(batch.images)
        return found

    def meter(self, device: torch.device) -> DetectionMeter:
        """Return an empty meter."""
        return DetectionMeter(self.masks)


class DetectionMeter:
    """Mean average precision of boxes and masks at the size of the network's input, over all ranks.

    Args:
        masks: Whether masks are measured too.
    """

    def __init__(self, masks: bool) -> None:
        self._kinds = {"bbox": "box", "segm": "mask"} if masks else {"bbox": "box"}
        # Ranks are gathered here: torchmetrics would wait for ever where they have seen different numbers of images.
        self._metric = MeanAveragePrecision(
            iou_type=tuple(self._kinds), sync_on_compute=False, distributed_available_fn=lambda: False
        )
        self._metric.warn_on_many_detections = False  # it looks at the best 100, as COCO does
        self._metric._coco_backend = self._matching = MatchingBackend()
        self._answers: Detected | None = None

    def update(self, outputs: Sequence[Mapping[str, Tensor]], batch: DetectionBatch) -> None:
        """Add what was found in the images of a batch."""
        keys = ("boxes", "labels", "scores", *(("masks",) if "mask" in self._kinds.values() else ()))
        predictions = [{key: found[key].detach().cpu() for key in keys} for found in outputs]
        for found in predictions:
            if "masks" in found:
                found["masks"] = found["masks"].flatten(0, 1) >= MASK_THRESHOLD  # [d, 1, h, w] -> [d, h, w]
        targets = [{key: tensor.cpu() for key, tensor in target.items()} for target in batch.targets]
        self._metric.update(predictions, targets)

    def compute(self) -> dict[str, float]:
        """Return `box_map`, `box_map_50`, `box_map_75`, the same for masks, and `items`.

        Raises:
            DataError: If there was no object to find.
        """
        self._gather()
        items = len(self._metric.groundtruth_labels)
        found = self._metric.compute()
        self._answers = self._matching.take(items)
        figures = {
            f"{name}_{figure}": float(found[figure if len(self._kinds) == 1 else f"{kind}_{figure}"])
            for kind, name in reversed(self._kinds.items())
            for figure in FIGURES
        }
        if min(figures.values()) < 0:
            raise DataError("The validation images hold no object at this size.", "Raise data.size.")
        return {**figures, "items": items}

    def answers(self) -> Detected:
        """Return how each detection was matched by `compute`, those of all ranks."""
        assert self._answers is not None, "compute() comes first"
        return self._answers

    def _gather(self) -> None:
        """Give every rank what all have seen, in the order of the data set."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return
        names = list(self._metric._defaults)
        ranks: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(ranks, {name: getattr(self._metric, name) for name in names})
        for name in names:
            rounds = zip_longest(*(rank[name] for rank in ranks))  # rank r has items r, r + ranks, …
            setattr(self._metric, name, [item for item in chain.from_iterable(rounds) if item is not None])


def make_detection(recipe: Recipe, data: Data, model: nn.Module) -> Detection:
    """Return the detection task.

    Raises:
        RecipeError: If the recipe asks for what only classification has.
        DataError: If the model learns masks and the data has none.
    """
    if recipe.train.label_smoothing:
        raise RecipeError("train.label_smoothing is for classification.", "Leave it out.")
    assert isinstance(data.train, DetectionDataset)
    return Detection(predicts_masks(recipe, model, data.train.masks))
