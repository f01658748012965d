"""Detectors of torchvision as graphs of static shapes, in operators that TensorRT and TensorRT-RTX build.

    boxes, labels, scores, masks = StaticDetector(model, (3, 800, 800))(images)

`paste_masks` puts the masks of one image into it, on the host, in numpy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from slope_compile.export.detection.paste import paste_masks

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slope_compile.export.detection.static import StaticDetector

__all__ = ["graph_form", "own_answer", "paste_masks"]


def graph_form(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Return what is exported for a model: a detector with static shapes, any other model as it is.

    Args:
        model: In eval mode; its layers are shared with what is returned, and have the same names there.
        shape: Of one input, without the batch axis.

    Raises:
        ModelError: If it is a detector that cannot be had with static shapes.
    """
    if not _is_detector(model):
        return model
    from slope_compile.export.detection.static import StaticDetector

    return StaticDetector(model, shape)


def own_answer(model: nn.Module, exported: nn.Module) -> Callable[[Tensor], object]:
    """Return what computes the reference outputs: the model itself, a detector by torchvision's own forward.

    Args:
        model: The model.
        exported: Its `graph_form`.
    """
    if model is exported:
        return model
    from slope_compile.export.detection.answer import OwnAnswer

    return OwnAnswer(cast(Any, model), cast("StaticDetector", exported).detections)


def _is_detector(model: nn.Module) -> bool:
    # Whoever has such a model has imported its module; whoever has none need not wait for torchvision.
    home = sys.modules.get("torchvision.models.detection.generalized_rcnn")
    return home is not None and isinstance(model, home.GeneralizedRCNN)
