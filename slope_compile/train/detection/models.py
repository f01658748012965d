"""Detectors: torchvision's R-CNNs by name, or a user's own, fitted to images that are resized and normalized before."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection import _utils
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.misc import FrozenBatchNorm2d

from slope_compile.errors import DataError, ModelError, RecipeError
from slope_compile.recipe import ModelSection, Recipe
from slope_compile.train.sources import TaskKind, is_local

STRIDE = 32  # of the coarsest feature map: data.size is a multiple, so that every map is a whole number of pixels
ZERO_EPS = ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")  # whose COCO_V1 were trained with eps 0 in their norms
NO_CATEGORY = ("__background__", "N/A")
HEADS = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
BATCH_NORM_KEPT = "_v2"  # torchvision's second editions keep batch norm where the first freeze it


def detector_names() -> list[str]:
    """Return torchvision's detectors that are R-CNNs with boxes, and maybe masks."""
    names = models.list_models(module=models.detection)
    return [name for name in names if name.startswith(("fasterrcnn_", "maskrcnn_"))]


def detector_weights(name: str) -> list[str]:
    """Return the weights that torchvision has for a detector or for its backbone."""
    return [*models.get_model_weights(name).__members__, *_backbone_weights(name).__members__]


def build_detector(name: str, section: ModelSection, classes: int, weights: str | None) -> nn.Module:
    """Build one of torchvision's detectors; a local weights file is loaded by the caller.

    Where the recipe names weights, the backbone's batch norms become constants, as torchvision has it: the batches of
    a detector are too small for their statistics. Every layer can be trained.

    Args:
        name: Of `detector_names`.
        section: The recipe's model section.
        classes: Without the background.
        weights: Of `detector_weights`, to be fetched now; None: not now.
    """
    builder = models.get_model_builder(name)
    untrained: dict[str, Any] = {"weights": None, "weights_backbone": None, "num_classes": classes + 1}
    model: nn.Module = builder(**untrained)
    if section.weights is None:
        return model
    if not name.endswith(BATCH_NORM_KEPT):
        _freeze_norms(model)
    own = models.get_model_weights(name)
    if name in ZERO_EPS and section.weights in own.__members__:
        _utils.overwrite_eps(model, 0.0)
    if weights is None or is_local(weights):
        return model
    if weights in own.__members__:
        source = builder(weights=weights, progress=False)
        rows = _head_rows(own[weights].meta["categories"], classes)
    else:
        source = builder(**{**untrained, "weights_backbone": weights}, progress=False)
        rows = None
    _copy(source, model, rows)
    return model


def is_detector(model: nn.Module) -> bool:
    """Say whether a model finds boxes rather than naming a class."""
    return isinstance(model, GeneralizedRCNN)


def fit_detector(model: nn.Module, section: ModelSection, size: int) -> None:
    """Set a detector's limits to the recipe's and keep it from resizing and normalizing again, in place.

    Raises:
        RecipeError: If `size` is no multiple of 32, or the recipe asks for the small stem.
    """
    if size % STRIDE:
        near = max(STRIDE, round(size / STRIDE) * STRIDE)
        raise RecipeError(
            f"data.size is {size}: a detector's images have a multiple of {STRIDE} pixels.", f"Set data.size: {near}."
        )
    if section.stem == "small":
        raise RecipeError(f"model.stem: small does not fit the detector {section.name}.", "Set stem: default.")
    parts: Any = model
    parts.transform = GeneralizedRCNNTransform(size, size, [0.0] * 3, [1.0] * 3, size_divisible=STRIDE)
    parts.rpn._pre_nms_top_n["testing"] = section.proposals  # on each feature map
    parts.rpn._post_nms_top_n["testing"] = section.proposals
    # Nor does training draw more of them, so that few proposals make a small detector.
    sampler = parts.roi_heads.fg_bg_sampler
    sampler.batch_size_per_image = min(sampler.batch_size_per_image, section.proposals)
    parts.roi_heads.detections_per_img = section.detections


def prove_detector(model: nn.Module, section: ModelSection, classes: int, size: int) -> None:
    """Run one black image through a detector in eval mode.

    Raises:
        ModelError: If it does not answer with boxes, labels and scores of `classes` + 1 classes.
    """
    widths: list[int] = []
    parts: Any = model
    # The classes' scores are the first thing that a box predictor returns.
    hook = parts.roi_heads.box_predictor.register_forward_hook(lambda _, __, out: widths.append(out[0].shape[-1]))
    try:
        with torch.no_grad():
            (answer,) = model(torch.zeros(1, 3, size, size))
    finally:
        hook.remove()
    if not {"boxes", "labels", "scores"} <= set(answer):
        raise ModelError(f"{section.name} answers with {sorted(answer)}.", "Return boxes, labels and scores.")
    if widths != [classes + 1]:
        raise ModelError(
            f"{section.name} tells {widths[0] if widths else 'no'} classes apart, not {classes + 1}: {classes} and "
            "the background.",
            "Give it a box predictor of that size.",
        )


def require_kind(recipe: Recipe, kind: TaskKind, model: nn.Module) -> None:
    """Raise if the model is of one kind and the data of the other.

    Raises:
        ModelError: Saying which is which.
    """
    found = "detection" if is_detector(model) else "classification"
    if found != kind:
        example = "digits" if found == "classification" else "coco:DIR"
        other = "torchvision/maskrcnn_resnet50_fpn" if kind == "detection" else "torchvision/resnet50"
        raise ModelError(
            f"{recipe.model.name} is a {found} model, but {recipe.data.source} is {kind} data.",
            f"Choose another model, such as {other}, or other data, such as {example}.",
        )


def predicts_masks(recipe: Recipe, model: nn.Module, masks: bool) -> bool:
    """Say whether a detector has a mask head.

    Args:
        recipe: For the error.
        model: The detector.
        masks: Whether the data has them.

    Raises:
        DataError: If it has one and the data has no masks.
    """
    parts: Any = model
    wanted = bool(parts.roi_heads.has_mask())
    if wanted and not masks:
        raise DataError(
            f"{recipe.data.source} has boxes only, and {recipe.model.name} learns masks.",
            "Add a segmentation to each annotation, or choose a detector without masks: "
            "torchvision/fasterrcnn_resnet50_fpn.",
        )
    return wanted


def _backbone_weights(name: str) -> Any:
    default = inspect.signature(models.get_model_builder(name)).parameters["weights_backbone"].default
    return type(default)


def _freeze_norms(model: nn.Module) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FrozenBatchNorm2d(module.num_features, module.eps))


def _head_rows(categories: list[str], classes: int) -> list[int] | None:
    """Return the source's rows of our classes: its own categories in order where there are as many of them as ours."""
    named = [row for row, category in enumerate(categories) if category not in NO_CATEGORY]
    return [0, *named] if len(named) == classes else None


def _copy(source: nn.Module, target: nn.Module, rows: list[int] | None) -> None:
    """Copy pretrained weights; of the prediction layers the given rows, or nothing."""
    theirs = source.state_dict()
    with torch.no_grad():
        for name, ours in target.state_dict().items():
            head = any(part in name for part in HEADS)
            if not head:
                ours.copy_(theirs[name])
            elif rows is not None:
                ours.copy_(_rows(theirs[name], rows, each=4 if "bbox_pred" in name else 1))


def _rows(tensor: Tensor, rows: list[int], each: int) -> Tensor:
    """Return those rows of a tensor that has `each` for every class."""
    chosen: Tensor = tensor.unflatten(0, (-1, each))[rows].flatten(0, 1)
    return chosen
