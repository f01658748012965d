from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from train_files import NET, write_image

from slope_compile.recipe import Recipe, recipe_from


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """These nets are too small to share among threads, which then only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """DIR/CLASS with two classes of five images."""
    for label, name in enumerate(("ant", "bee")):
        for index in range(5):
            write_image(tmp_path / "images" / name / f"{index}.png", seed=10 * label + index)
    return tmp_path / "images"
