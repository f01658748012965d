"""A torchvision Faster or Mask R-CNN whose shapes do not depend on what is in the image.

torchvision's own forward keeps as many proposals and detections as there are, which neither torch.export nor TensorRT
takes. Here every count is fixed, boxes that are not there are masked out, and the answer is the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

from slope_compile.errors import ModelError
from slope_compile.export.detection.pooling import Pyramid, pool, pyramid
from slope_compile.export.detection.suppress import best, overlaps, suppress

MOST_CANDIDATES = 3840  # the largest k of TensorRT's TopK
SMALLEST_DETECTION = 1e-2  # pixels; torchvision's RoIHeads.postprocess_detections drops boxes below it
ABSENT = -1.0  # score of what is masked out: below every probability


class StaticDetector(nn.Module):
    """Computes a detector's answer with static shapes, through the detector's own layers, under their own names.

    Args:
        model: In eval mode; its submodules are shared, not copied.
        shape: Channels, height and width of one image, prepared as `model.transform` expects it.

    Attributes:
        size: Height and width of an image.
        proposals: Boxes that reach the heads, an image.
        detections: D, rows of each output.

    Raises:
        ModelError: If the model is a detector of another kind, or its transform would resize such images.
    """

    def __init__(self, model: GeneralizedRCNN, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.size = _image_size(model, shape)
        _require_known(model)
        self.backbone: nn.Module = model.backbone
        self.rpn: RegionProposalNetwork = model.rpn
        self.roi_heads: RoIHeads = model.roi_heads
        self._device = next(model.parameters()).device
        transform = model.transform
        mean, std = (torch.tensor(each, dtype=torch.float32) for each in (transform.image_mean, transform.image_std))
        self._normalizes = bool(mean.any() or (std != 1).any())
        self._constant("mean", mean.reshape(-1, 1, 1))
        self._constant("std", std.reshape(-1, 1, 1))
        stride = transform.size_divisible
        self._padding = [math.ceil(side / stride) * stride - side for side in self.size]
        anchors, heights = self._measure(shape)
        for index, level in enumerate(anchors):
            self._constant(f"anchors{index}", level)
        # Proposals that enter suppression, by level, and those that come out of it.
        self._kept = [min(self.rpn.pre_nms_top_n(), len(level)) for level in anchors]
        self.proposals = int(min(self.rpn.post_nms_top_n(), len(anchors) * max(self._kept)))
        self._place()
        self._box_pyramid = self._pyramid(self.roi_heads.box_roi_pool, heights)
        self._mask_pyramid = self._pyramid(self.roi_heads.mask_roi_pool, heights) if self.roi_heads.has_mask() else None
        self._candidates = min(self.proposals * (_classes(self.roi_heads) - 1), MOST_CANDIDATES)
        self.detections = int(min(self.roi_heads.detections_per_img, self._candidates))

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.to(self._device), persistent=False)

    def _place(self) -> None:
        """Lay the proposals of all levels out as [levels, most of a level]: where each comes from, and if it exists."""
        most, kept = max(self._kept), torch.tensor(self._kept).unsqueeze(1)
        filled = torch.arange(most) < kept  # [levels, most]
        places = torch.where(filled, torch.arange(most) + kept.cumsum(0) - kept, 0)
        self._constant("places", places.flatten())
        self._constant("filled", filled.flatten().float())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return boxes, labels, scores and, of a Mask R-CNN, masks; what is beyond an image's count is all zeros.

        Args:
            images: float32 [B, 3, H, W].

        Returns:
            `boxes` float32 [B, D, 4], x1, y1, x2, y2 in pixels; `labels` int64 [B, D]; `scores` float32 [B, D], the
            highest first; `masks` float32 [B, D, 28, 28], the probability of the detected class inside the box.
        """
        features = self._features(images)
        boxes, present = self._propose(list(features.values()))
        found = self._detect(features, boxes, present)
        if self._mask_pyramid is None:
            return found
        heads = self.roi_heads
        pooled = pool(_chosen(features, heads.mask_roi_pool), found["boxes"], self._mask_pyramid)
        probabilities = torch.sigmoid(heads.mask_predictor(heads.mask_head(pooled)))  # [B·D, classes, 28, 28]
        side = probabilities.shape[-1]
        wanted = found["labels"].reshape(-1, 1, 1, 1).expand(-1, 1, side, side)
        masks = probabilities.gather(1, wanted).reshape(-1, self.detections, side, side)
        return found | {"masks": masks * (found["scores"] > 0).float()[..., None, None]}

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        if self._normalizes:
            images = (images - self.get_buffer("mean")) / self.get_buffer("std")
        if any(self._padding):
            images = functional.pad(images, (0, self._padding[1], 0, self._padding[0]))
        features: Any = self.backbone(images)
        return {"0": features} if isinstance(features, Tensor) else dict(features)

    def _propose(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return proposals [B, P, 4] and whether each is there, bool [B, P] (rpn.filter_proposals)."""
        objectness, deltas = self.rpn.head(features)
        logits, offsets, anchors = [], [], []
        for level, keep in enumerate(self._kept):
            top, index = best(objectness[level].permute(0, 2, 3, 1).flatten(1), keep)  # of [B, H·W·A]
            each = deltas[level].unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)  # [B, H·W·A, 4]
            logits.append(top)
            offsets.append(each.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)))
            anchors.append(self.get_buffer(f"anchors{level}")[index])
        from_anchors = self.rpn.box_coder.decode_single(_rows(offsets), _rows(anchors))
        boxes = self._clip(from_anchors.reshape(-1, sum(self._kept), 4))
        scores = torch.sigmoid(torch.cat(logits, 1))
        fits = _large(boxes, self.rpn.min_size) & (scores >= self.rpn.score_thresh)
        # Suppression looks at one level at a time: [B, levels, most], where a place that no proposal has is not valid.
        boxes, scores = (torch.index_select(values, 1, self.get_buffer("places")) for values in (boxes, scores))
        valid = torch.index_select(fits.float(), 1, self.get_buffer("places")) * self.get_buffer("filled")
        shape = (len(self._kept), max(self._kept))
        by_level = boxes.unflatten(1, shape)
        kept = suppress(overlaps(by_level, self.rpn.nms_thresh), valid.unflatten(1, shape)).flatten(1)
        top, index = best(torch.where(kept > 0, scores, ABSENT), self.proposals)
        return boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)), top >= 0

    def _detect(self, features: dict[str, Tensor], proposals: Tensor, present: Tensor) -> dict[str, Tensor]:
        """Return boxes, labels and scores (roi_heads.postprocess_detections).

        The best candidates of all classes are enough: suppression looks at higher scores only. The answer could differ
        only where more than MOST_CANDIDATES pass the score threshold and fewer than D of the best of them survive.
        """
        heads = self.roi_heads
        pooled = pool(_chosen(features, heads.box_roi_pool), proposals, self._box_pyramid)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        classes = logits.shape[-1] - 1  # without the background
        decoded = heads.box_coder.decode_single(deltas, proposals.reshape(-1, 4))
        decoded = self._clip(decoded.reshape(-1, self.proposals, classes + 1, 4)[:, :, 1:])  # [B, P, classes, 4]
        score = functional.softmax(logits, -1).reshape(-1, self.proposals, classes + 1)[..., 1:]
        fits = (score > heads.score_thresh) & _large(decoded, SMALLEST_DETECTION) & present.unsqueeze(-1)
        top, index = best(torch.where(fits, score, ABSENT).flatten(1), self._candidates)  # [B, M]
        boxes = decoded.flatten(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, 4))
        labels = index % classes + 1
        alike = (labels.unsqueeze(-1) == labels.unsqueeze(-2)).float()
        kept = suppress(overlaps(boxes, heads.nms_thresh) * alike, (top >= 0).float())
        scores, index = best(torch.where(kept > 0, top, ABSENT), self.detections)  # [B, D]
        found = scores >= 0
        boxes = boxes.gather(1, index.unsqueeze(-1).expand(-1, -1, 4)) * found.unsqueeze(-1).float()
        return {"boxes": boxes, "labels": labels.gather(1, index) * found, "scores": scores.clamp(min=0)}

    def _clip(self, boxes: Tensor) -> Tensor:
        height, width = self.size
        limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
        return torch.minimum(boxes.clamp(min=0), limit)

    @torch.no_grad()
    def _measure(self, shape: tuple[int, ...]) -> tuple[list[Tensor], dict[str, int]]:
        """Return the anchors of each level, [anchors, 4], and the height of each feature."""
        features = self._features(torch.zeros(1, *shape, device=self._device))
        padded = functional.pad(torch.zeros(1, *shape), (0, self._padding[1], 0, self._padding[0]))
        generator: AnchorGenerator = self.rpn.anchor_generator
        (anchors,) = generator(ImageList(padded, [self.size]), list(features.values()))
        each = generator.num_anchors_per_location()
        counts = [f.shape[2] * f.shape[3] * n for f, n in zip(features.values(), each, strict=True)]
        return [level.clone() for level in anchors.split(counts)], {name: f.shape[2] for name, f in features.items()}

    def _pyramid(self, pooler: MultiScaleRoIAlign, heights: dict[str, int]) -> Pyramid:
        chosen = [height for name, height in heights.items() if name in pooler.featmap_names]
        output, ratio = pooler.output_size[0], pooler.sampling_ratio
        return pyramid(chosen, self.size[0], output, ratio, pooler.canonical_scale, pooler.canonical_level)


def _chosen(features: dict[str, Tensor], pooler: MultiScaleRoIAlign) -> list[Tensor]:
    return [feature for name, feature in features.items() if name in pooler.featmap_names]


def _rows(levels: list[Tensor]) -> Tensor:
    """Return the boxes of all levels, [B, n, 4] each, as [B·Σn, 4]."""
    return torch.cat(levels, 1).flatten(0, 1)


def _large(boxes: Tensor, size: float) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] >= size).all(-1)


def _classes(heads: RoIHeads) -> int:
    """Return the number of classes, the background included."""
    score: Any = getattr(heads.box_predictor, "cls_score", None)
    if not isinstance(score, nn.Linear):
        raise ModelError(
            f"{type(heads.box_predictor).__name__} has no 'cls_score' layer: the number of classes is unknown.",
            "Use torchvision's FastRCNNPredictor.",
        )
    return score.out_features


def _image_size(model: GeneralizedRCNN, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 3:
        raise ModelError(f"{type(model).__name__} takes images, not {list(shape)}.", "Give images [n, 3, h, w].")
    height, width = shape[1:]
    transform = model.transform
    factor = min(transform.min_size[-1] / min(height, width), transform.max_size / max(height, width))
    fixed = transform.fixed_size
    if factor != 1 if fixed is None else tuple(fixed) != (width, height):
        raise ModelError(
            f"{type(model).__name__} resizes images of {height} x {width} inside itself; the exported graph does not.",
            f"Set model.transform.min_size = ({min(height, width)},) and max_size = {max(height, width)}, "
            "and prepare images of that size.",
        )
    return height, width


def _require_known(model: GeneralizedRCNN) -> None:
    """Raise unless every part is one whose arithmetic is known here."""
    heads, rpn = model.roi_heads, model.rpn
    problems = [
        f"{what} is a {type(part).__name__}"
        for what, part, known in (
            ("roi_heads", heads, RoIHeads),
            ("rpn", rpn, RegionProposalNetwork),
            ("rpn.anchor_generator", getattr(rpn, "anchor_generator", None), AnchorGenerator),
            ("roi_heads.box_roi_pool", getattr(heads, "box_roi_pool", None), MultiScaleRoIAlign),
        )
        if not isinstance(part, known)
    ]
    if not problems:
        if heads.has_keypoint():
            problems.append("it finds keypoints")
        poolers = [heads.box_roi_pool, *([heads.mask_roi_pool] if heads.has_mask() else [])]
        for pooler in poolers:
            square = len(set(pooler.output_size)) == 1
            if not isinstance(pooler, MultiScaleRoIAlign) or pooler.sampling_ratio < 1 or not square:
                problems.append(f"it pools with {pooler}, not square with a fixed sampling_ratio")
    if problems:
        raise ModelError(
            f"{type(model).__name__} cannot be exported with static shapes: {'; '.join(problems)}.",
            "Use torchvision's Faster R-CNN or Mask R-CNN, with sampling_ratio 1 or more.",
        )
