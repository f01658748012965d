from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn, optim

from slope_compile.recipe import Recipe, recipe_from
from slope_compile.train.checkpoint import save_state

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


def recipe_of(net_file: Path, **sections: dict[str, Any]) -> Recipe:
    """The tiny net on 64 made-up images, two epochs a phase; `sections` replace keys."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": f"{net_file}:net"},
        "data": {"source": "fake:64", "size": 8, "batch": 32, "workers": 0},
        "train": {"pretrain_epochs": 2, "epochs": 2, "lr": 0.05, "precision": "fp32"},
    }
    for name, keys in sections.items():
        raw[name] = raw.get(name, {}) | keys
    return recipe_from(raw, "test")


def write_image(path: Path, seed: int = 0, side: int = 12) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def commit(folder: Path, done: int) -> tuple[nn.Module, optim.Optimizer]:
    """Save the state of a small module after epoch `done`: every weight is `done`, every momentum -`done`."""
    module = nn.Linear(3, 2)
    optimizer = optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
    for parameter in module.parameters():
        nn.init.constant_(parameter, float(done))
        optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, -float(done))
    save_state(folder, "recipe", done, module, optimizer, {"epochs": [done]}, None)
    return module, optimizer
