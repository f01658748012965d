from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slope_compile.recipe import Recipe, recipe_from

NET = '''
from torch import nn

def net(classes):
    """A convolutional net with everything that matters: first layer, prunable layer, batch norms, dropout, head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
'''


@pytest.fixture
def net_file(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(NET)
    return path


@pytest.fixture
def make_recipe(net_file: Path) -> Callable[..., Recipe]:
    """A recipe of the tiny net on 64 made-up images; keywords replace keys of a section."""

    def make(**sections: dict[str, Any]) -> Recipe:
        raw: dict[str, dict[str, Any]] = {
            "model": {"name": f"{net_file}:net"},
            "data": {"source": "fake:64", "size": 8, "batch": 32, "workers": 0},
            "train": {"pretrain_epochs": 2, "epochs": 2, "lr": 0.05, "precision": "fp32"},
        }
        for name, keys in sections.items():
            raw[name] = raw.get(name, {}) | keys
        return recipe_from(raw, "test")

    return make


def write_image(path: Path, seed: int = 0, side: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """DIR/CLASS with two classes of five images."""
    for label, name in enumerate(("ant", "bee")):
        for index in range(5):
            write_image(tmp_path / "images" / name / f"{index}.png", seed=10 * label + index)
    return tmp_path / "images"
