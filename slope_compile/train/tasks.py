"""What is learnt: the loss that training lowers and the metric that tells how well."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.classification import MulticlassAccuracy


class Classification:
    """Image classification: cross entropy, top-1 accuracy.

    Args:
        classes: Size of the head.
        label_smoothing: Of the training loss; the validation loss has none.
    """

    def __init__(self, classes: int, label_smoothing: float = 0.0) -> None:
        self.classes, self.label_smoothing = classes, label_smoothing

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss of logits [n, classes] against int64 labels [n]."""
        return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

    def meter(self, device: torch.device) -> ClassificationMeter:
        """Return an empty meter."""
        return ClassificationMeter(self.classes, device)


class ClassificationMeter:
    """Accuracy (share of 1), mean cross entropy and item count; summed over all ranks where there are several."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self._accuracy = MulticlassAccuracy(classes, average="micro").to(device)
        self._loss, self._items = MeanMetric().to(device), SumMetric().to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self._accuracy.update(logits, labels)
        self._loss.update(losses)
        self._items.update(len(labels))

    def compute(self) -> dict[str, float]:
        """Return {"accuracy", "loss", "items"}."""
        accuracy, loss, items = (float(m.compute()) for m in (self._accuracy, self._loss, self._items))
        return {"accuracy": accuracy, "loss": loss, "items": int(items)}
