"""Detectors of torchvision's own classes, small, with random weights that are large enough to detect things."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FrozenBatchNorm2d

torch.set_num_threads(1)
SIDE, CLASSES, WIDTH = 64, 4, 8
WIDTHS = (3, 8, 8, 16, 16)


def detector(
    masks: bool = True, frozen_norms: bool = False, conv_depth: int = 1, seed: int = 0, levels: int = 5, **settings: Any
) -> FasterRCNN:
    """A Faster or Mask R-CNN over so many levels, 3 classes and background, 30 proposals, 8 detections."""
    torch.manual_seed(seed)
    body: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (wide, wider) in enumerate(itertools.pairwise(WIDTHS)):
        stride = 2 if index else 4
        norm = FrozenBatchNorm2d(wider) if frozen_norms else nn.BatchNorm2d(wider)
        conv = nn.Conv2d(wide, wider, 3, stride, padding=1, bias=False)
        body[f"layer{index + 1}"] = nn.Sequential(conv, norm, nn.ReLU())
    named = {f"layer{index + 1}": str(index) for index in range(levels - 1)}  # the last level is pooled
    backbone = BackboneWithFPN(nn.Sequential(body), named, list(WIDTHS[1:levels]), WIDTH)
    anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (96,))[:levels], ((0.5, 1.0, 2.0),) * levels)
    parts = {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(WIDTH, 3, conv_depth),
        "box_head": TwoMLPHead(WIDTH * 49, 32),
        "box_predictor": FastRCNNPredictor(32, CLASSES),
    }
    if masks:
        parts |= {
            "mask_head": MaskRCNNHeads(WIDTH, (WIDTH, WIDTH), 1),
            "mask_predictor": MaskRCNNPredictor(WIDTH, WIDTH, CLASSES),
        }
    given = {
        "min_size": SIDE,
        "max_size": SIDE,
        "image_mean": [0.0] * 3,
        "image_std": [1.0] * 3,
        "rpn_pre_nms_top_n_test": 30,
        "rpn_post_nms_top_n_test": 30,
        "box_detections_per_img": 8,
    }
    model = (MaskRCNN if masks else FasterRCNN)(backbone, None, **(parts | given | settings))
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=1.2 / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
            module.running_mean.normal_(std=0.1)
    return model.eval()


def images(count: int, side: int = SIDE, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
