from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from train_files import NET, recipe_of, write_image

from slope_compile.recipe import Recipe


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
    return partial(recipe_of, net_file)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """DIR/CLASS with two classes of five images."""
    for label, name in enumerate(("ant", "bee")):
        for index in range(5):
            write_image(tmp_path / "images" / name / f"{index}.png", seed=10 * label + index)
    return tmp_path / "images"
