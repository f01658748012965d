"""ResNet-50 and DeiT-S, random weights, through every placement: the law on models of real size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from placement_models import everywhere, export, layers_of, place, require_same_weights, run, situation
from torchvision.models.resnet import Bottleneck, ResNet

pytestmark = pytest.mark.e2e
# (backend, precision, placements): where each is possible, once
WEIGHT_ONLY = (
    ("tensorrt", "fp32", ("int8-weight", "int4-weight")),
    ("tensorrt", "fp16", ("sparse-fp16",)),
    ("tensorrt-rtx", "fp32", ("int4-storage",)),
)
QUANTIZED = (("tensorrt", "fp32", ("sparse-int8",)),)


# The real ones once; beside INT8 activations smaller ones of their kind, for an export of those takes long.
MODELS: dict[str, tuple[bool, Any, tuple[int, ...]]] = {
    "resnet50": (False, torchvision.models.resnet50, (3, 64, 64)),
    "bottlenecks-int8": (True, lambda: ResNet(Bottleneck, [1, 1, 1, 1]), (3, 64, 64)),
    "deit_small": (False, lambda: timm.create_model("deit_small_patch16_224"), (3, 224, 224)),
    "deit_small-int8": (True, lambda: timm.create_model("deit_small_patch16_224", depth=1), (3, 224, 224)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_are_those_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantized, make, shape = MODELS[name]
    model, x = make(), torch.randn(2, *shape)
    settings: dict[str, Any] = {"activation_bits": 8} if quantized else {}
    exported = tmp_path / "model.onnx"
    codes = export(model, x, exported, **settings)
    layers, expected = layers_of(exported), run(exported, x[:1].numpy())
    assert all(layer.positions_known for layer in layers)
    for backend, precision, placements in QUANTIZED if quantized else WEIGHT_ONLY:
        for placement in placements:
            asked = everywhere(layers, placement, situation(backend=backend, precision=precision))
            if asked is None:
                assert (name, placement) in {("resnet50", "int4-weight"), ("deit_small", "int4-storage")}
                continue
            placed, places = place(exported, asked, tmp_path / "placed")
            require_same_weights(placed, codes, places)
            if placement in ("int4-weight", "int4-storage", "sparse-int8"):
                assert np.array_equal(run(placed, x[:1].numpy()), expected)  # K is a multiple of 64: the same sums
