"""What is learnt: how items become a batch, the loss that training lowers, the figures that tell how well.

The loop, the evaluation and the verifier know a task by the protocols below and never look inside a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchmetrics import MeanMetric, SumMetric

from slope_compile.recipe import Recipe
from slope_compile.train.data import Data
from slope_compile.train.engine import every_rank
from slope_compile.train.validation import Answers, Classified


class Batch(Protocol):
    """Some items of a data set, collated. `pin_memory` is called where batches go to a GPU."""

    @property
    def images(self) -> Tensor:
        """Float32 [n, 3, size, size]."""
        ...

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def to(self, device: torch.device, layout: torch.memory_format, non_blocking: bool = True) -> Any:
        """Return the batch on a device, its images in a memory layout."""
        ...

    def split(self, parts: int) -> Sequence[Any]:
        """Return the items, in order, as `parts` batches whose sizes differ by one at most; parts <= items."""
        ...

    def pin_memory(self) -> Any:
        """Return the batch in page-locked memory."""
        ...


class Meter(Protocol):
    """Figures over the items seen, summed over all ranks where there are several."""

    def update(self, outputs: Any, batch: Any) -> None:
        """Add a batch and what the model answered."""
        ...

    def compute(self) -> dict[str, float]:
        """Return name -> figure; "items" is the number of items."""
        ...

    def answers(self) -> Answers:
        """Return what was answered to each item, in the order of the split; after `compute`."""
        ...


class Task(Protocol):
    """One kind of learning problem; it is sent to data workers, so it holds no model."""

    @property
    def metric(self) -> str:
        """The primary figure's name in a meter's result, a share of 1 where more is better."""
        ...

    def collate(self, items: Sequence[Any]) -> Batch:
        """Return items of the data set as one batch."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Run the training forward pass; return the loss, a mean over the batch's items."""
        ...

    def predict(self, model: nn.Module, batch: Any) -> Any:
        """Run the model in eval mode; return what a meter takes."""
        ...

    def meter(self, device: torch.device) -> Meter:
        """Return an empty meter."""
        ...


def make_task(recipe: Recipe, data: Data, model: nn.Module) -> Task:
    """Return the task that the data set poses, by `data.kind`.

    Raises:
        ModelError: If the model is of another kind than the data.
        DataError, RecipeError: If the data has no masks and the model learns them, or a key fits another kind only.
    """
    from slope_compile.train.detection.models import require_kind
    from slope_compile.train.detection.task import make_detection

    require_kind(recipe, data.kind, model)
    if data.kind == "detection":
        return make_detection(recipe, data, model)
    return Classification(recipe.train.label_smoothing)


@dataclass(frozen=True)
class ImageBatch:
    """Images and their classes.

    Args:
        images: Float32 [n, 3, size, size].
        labels: Int64 [n].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Any:
        """Give the images, then the labels: `images, labels = batch`."""
        return iter((self.images, self.labels))

    def to(self, device: torch.device, layout: torch.memory_format, non_blocking: bool = True) -> ImageBatch:
        """Return the batch on a device, its images in a memory layout."""
        images = self.images.to(device, non_blocking=non_blocking, memory_format=layout)
        return ImageBatch(images, self.labels.to(device, non_blocking=non_blocking))

    def split(self, parts: int) -> list[ImageBatch]:
        """Return the items, in order, as `parts` batches whose sizes differ by one at most."""
        sides = (self.images.tensor_split(parts), self.labels.tensor_split(parts))
        return [ImageBatch(images, labels) for images, labels in zip(*sides, strict=True)]

    def pin_memory(self) -> ImageBatch:
        """Return the batch in page-locked memory."""
        return ImageBatch(self.images.pin_memory(), self.labels.pin_memory())


@dataclass(frozen=True)
class Classification:
    """Image classification: cross entropy, top-1 accuracy.

    Args:
        label_smoothing: Of the training loss; the validation loss has none.
    """

    label_smoothing: float = 0.0
    metric: str = "accuracy"

    def collate(self, items: Sequence[tuple[Tensor, int]]) -> ImageBatch:
        """Return pairs of an image and its class as one batch."""
        images, labels = default_collate(list(items))
        return ImageBatch(images, labels)

    def loss(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return the mean cross entropy of the model's logits [n, classes]."""
        logits: Tensor = model(batch.images)
        return F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)

    def predict(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return logits [n, classes]."""
        logits: Tensor = model(batch.images)
        return logits

    def meter(self, device: torch.device) -> ClassificationMeter:
        """Return an empty meter."""
        return ClassificationMeter(device)


class ClassificationMeter:
    """Accuracy (share of 1), mean cross entropy and item count; summed over all ranks where there are several."""

    def __init__(self, device: torch.device) -> None:
        # A NaN must show: the default drops it from the mean.
        self._accuracy = MeanMetric(nan_strategy="disable").to(device)
        self._loss, self._items = MeanMetric(nan_strategy="disable").to(device), SumMetric().to(device)
        self._seen: list[Tensor] = []  # int32 [2, n]: labels, predictions
        self._count(torch.empty(0, device=device), torch.empty(0, device=device))  # a rank may have no item at all

    def update(self, outputs: Tensor, batch: ImageBatch) -> None:
        """Add a batch."""
        losses = F.cross_entropy(outputs.float(), batch.labels, reduction="none")
        predictions = outputs.argmax(dim=1)
        self._count((predictions == batch.labels).float(), losses)
        self._seen.append(torch.stack([batch.labels, predictions]).int())

    def compute(self) -> dict[str, float]:
        """Return {"accuracy", "loss", "items"}."""
        accuracy, loss, items = (float(m.compute()) for m in (self._accuracy, self._loss, self._items))
        return {"accuracy": accuracy, "loss": loss, "items": int(items)}

    def answers(self) -> Classified:
        """Return right classes and predicted ones, over all ranks; rank r of R has seen items r, r + R, …, in order."""
        mine = torch.cat(self._seen, dim=1).cpu().numpy() if self._seen else np.zeros((2, 0), np.int32)
        ranks = every_rank(mine)
        both = np.empty((2, sum(part.shape[1] for part in ranks)), np.int32)
        for rank, part in enumerate(ranks):
            both[:, rank :: len(ranks)] = part
        return Classified(both[0], both[1])

    def _count(self, right: Tensor, losses: Tensor) -> None:
        self._accuracy.update(right)
        self._loss.update(losses)
        self._items.update(len(right))
