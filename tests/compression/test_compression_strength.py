"""The default strength of the cosine penalty, unchanged on the three families of the paper."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from torchvision import models

import slope_compile as sc
from slope_compile.compression.regularizer import AUTO_STRENGTH

SR_STE = AUTO_STRENGTH["sr-ste"]


def mask_rcnn() -> nn.Module:
    return models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": lambda: models.resnet18(),
    "DeiT-S": lambda: timm.create_model("deit_small_patch16_224"),
    "Mask R-CNN": mask_rcnn,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_weights_decay_about_as_fast_as_under_sr_ste(family: str) -> None:
    """The rate is λ cos/(K‖w_i‖²) (facts of docs/method.md): measured here on the gradient itself, filter by filter."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    sc.compress(model, bits=2, pattern="2:4", regularizer="cosine")
    sc.penalty(model).backward()
    rates = {}
    for name, layer in model.named_modules():
        if not torch.nn.utils.parametrize.is_parametrized(layer, "weight"):
            continue
        slope, latent = layer.parametrizations["weight"][0], layer.parametrizations["weight"].original
        mask = slope.mask(latent)
        if mask is not None:
            with torch.no_grad():
                # gradient = rate * weight where pruned: the least-squares slope over the layer's pruned weights
                w, g = latent[~mask].double(), latent.grad[~mask].double()
                rates[name] = float((w * g).sum() / w.square().sum())
    assert len(rates) > 15
    outside = {name: rate for name, rate in rates.items() if not SR_STE / 10 < rate < SR_STE * 20}
    assert not outside, f"SR-STE decays at {SR_STE}; {outside}"
