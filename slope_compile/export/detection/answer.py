"""What torchvision itself answers, in the form of the exported graph: the reference that the graph is held to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN


class OwnAnswer:
    """Runs a detector through torchvision's own forward, and pads what it finds with zeros to fixed counts.

    Masks are those of the mask head, not pasted into the image; boxes are in pixels of the images given.

    Args:
        model: In eval mode.
        detections: Rows of each output.
    """

    def __init__(self, model: GeneralizedRCNN, detections: int) -> None:
        self._model, self._detections = model, detections

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs of `StaticDetector`, as torchvision computes them."""
        model = self._model
        prepared, _ = model.transform(list(images))
        features = model.backbone(prepared.tensors)
        if isinstance(features, Tensor):
            features = {"0": features}
        proposals, _ = model.rpn(prepared, features)
        found, _ = model.roi_heads(features, proposals, prepared.image_sizes)
        answer = {
            "boxes": [self._padded(one["boxes"]) for one in found],
            "labels": [self._padded(one["labels"]) for one in found],
            "scores": [self._padded(one["scores"]) for one in found],
        }
        if model.roi_heads.has_mask():
            answer["masks"] = [self._padded(one["masks"][:, 0]) for one in found]
        return {name: torch.stack(rows) for name, rows in answer.items()}

    def _padded(self, rows: Tensor) -> Tensor:
        return functional.pad(rows, (*[0, 0] * (rows.ndim - 1), 0, self._detections - len(rows)))
