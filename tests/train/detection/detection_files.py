"""A small Mask R-CNN in a user's own file, COCO folders, and a set that it learns within seconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slope_compile.recipe import Recipe, recipe_from

DETECTOR = '''
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

W = 32


def body():
    """Stride 8, one feature map."""
    widths = [3, 16, W, W]
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.Conv2d(W, W, 3, padding=1), nn.ReLU())
    backbone.out_channels = W
    return backbone


def parts(classes):
    return {
        "rpn_anchor_generator": AnchorGenerator(((16, 32),), ((1.0,),)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], 5, 1),
        "box_head": TwoMLPHead(W * 25, 64),
        "box_predictor": FastRCNNPredictor(64, classes + 1),
    }


def detector(classes):
    return MaskRCNN(
        body(), **parts(classes), mask_roi_pool=MultiScaleRoIAlign(["0"], 8, 1), mask_head=MaskRCNNHeads(W, (W,), 1),
        mask_predictor=MaskRCNNPredictor(W, W, classes + 1),
    )


def boxes_only(classes):
    return FasterRCNN(body(), **parts(classes))


def too_few(classes):
    return FasterRCNN(body(), **parts(classes - 1))


def classifier(classes):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
'''


def detection_recipe(file: Path, function: str = "detector", **sections: dict[str, Any]) -> Recipe:
    """The small detector on 16 drawn images of 64 pixels; `sections` replace keys."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": f"{file}:{function}", "proposals": 16, "detections": 5},
        "data": {"source": "shapes:16", "size": 64, "batch": 4, "workers": 0, "augment": "none"},
        "train": {"pretrain_epochs": 1, "epochs": 1, "lr": 0.01, "precision": "fp32"},
    }
    for name, keys in sections.items():
        raw[name] = raw.get(name, {}) | keys
    return recipe_from(raw, "test")


# Two images of 40 x 30 pixels; category ids with gaps and out of order.
DOCUMENT: dict[str, Any] = {
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 8, "file_name": "deep/b.png", "width": 40, "height": 30},
    ],
    "annotations": [
        {
            "id": 1, "image_id": 7, "category_id": 90, "bbox": [4, 5, 10, 8], "iscrowd": 0,
            "segmentation": [[4, 5, 14, 5, 14, 13, 4, 13]],
        },
        {
            "id": 2, "image_id": 7, "category_id": 3, "bbox": [0, 0, 2, 30], "iscrowd": 1,
            "segmentation": {"size": [30, 40], "counts": [0, 60, 1140]},
        },
    ],
}  # fmt: skip


def coco_folder(root: Path, change: Any = None) -> Path:
    """Write DOCUMENT as both splits, the training one after `change(document)`."""
    for name in ("train2017", "val2017"):
        document = copy.deepcopy(DOCUMENT)
        if change is not None and name == "train2017":
            document = change(document) or document
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))
        (root / name / "deep").mkdir(parents=True, exist_ok=True)
        for index, file in enumerate(("a.png", "deep/b.png")):
            pixels = np.random.default_rng(index).integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / file)
    return root


def easy_folder(root: Path, train: int = 48, val: int = 16, side: int = 64) -> Path:
    """Write a COCO folder with one large bright square or disc on dark noise in each image."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    for name, count in (("train", train), ("val", val)):
        document: dict[str, list[Any]] = {
            "categories": [{"id": 1, "name": "square"}, {"id": 2, "name": "disc"}], "images": [], "annotations": [],
        }  # fmt: skip
        for folder in (root / name, root / "annotations"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(1, count + 1):
            pixels = draw.integers(0, 60, (side, side, 3), dtype=np.uint8)
            radius = int(draw.integers(12, 20))
            middle = draw.integers(radius, side - radius, 2)
            dx, dy, label = x - middle[0], y - middle[1], 1 + number % 2
            mask = (np.maximum(abs(dx), abs(dy)) if label == 1 else np.hypot(dx, dy)) <= radius
            pixels[mask] += np.uint8(150)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
            document["images"].append({"id": number, "file_name": f"{number}.png", "width": side, "height": side})
            columns = mask.T.ravel()  # the first pixel of an image is on the background
            counts = np.diff([0, *(np.flatnonzero(np.diff(columns)) + 1), columns.size]).tolist()
            box = [int(middle[0]) - radius, int(middle[1]) - radius, 2 * radius + 1, 2 * radius + 1]
            document["annotations"].append({
                "id": number, "image_id": number, "category_id": label, "bbox": box, "area": int(mask.sum()),
                "iscrowd": 0, "segmentation": {"size": [side, side], "counts": counts},
            })  # fmt: skip
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(document))
    return root
