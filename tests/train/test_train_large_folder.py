"""Of a folder too large to be decoded whole before training, a sample is; the rest is judged when it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_files import write_image

from slope_compile.errors import DataError
from slope_compile.events import Events
from slope_compile.recipe import DataSection, Recipe
from slope_compile.train import data, images
from slope_compile.train.data import load_data
from slope_compile.train.images import to_check
from slope_compile.train.loader import batches
from slope_compile.train.loop import train
from slope_compile.train.sources import ImageFile


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DIR/train and DIR/val, two classes of six images each; more than four files are a large split: two are read."""
    for split in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            for index in range(6):
                write_image(tmp_path / "images" / split / name / f"{index}.png", seed=10 * label + index)
    monkeypatch.setattr(images, "CHECK_ALL", 4)
    monkeypatch.setattr(images, "SAMPLE", 2)
    return tmp_path / "images"


def section(folder: Path, bad_images: str) -> DataSection:
    return DataSection(source=f"imagefolder:{folder}", size=8, batch=4, bad_images=bad_images, augment="none")  # type: ignore[arg-type]


def test_a_sample_is_spread_evenly_and_validation_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [ImageFile(str(index), 0, 0, 0) for index in range(3000)]
    monkeypatch.setattr(images, "CHECK_ALL", 100)
    monkeypatch.setattr(images, "SAMPLE", 50)
    checked = to_check(files, range(2700), range(2700, 3000))
    assert [file.path for file in checked[:3]] == ["0", "54", "108"]
    assert len(checked) == 50 + 300
    assert len(to_check(files, range(100), [])) == 100


def test_a_broken_file_outside_the_sample_is_named_when_it_is_read(folder: Path) -> None:
    broken = folder / "train" / "ant" / "3.png"
    broken.write_bytes(b"broken")
    found = load_data(section(folder, "refuse"), seed=0)
    assert found.skipped == {}
    with pytest.raises(DataError, match=r"ant/3\.png: not an image"):
        list(batches(found.train, [list(range(12))], 0, pin=False))


def test_a_broken_file_of_the_sample_or_of_validation_is_named_at_once(folder: Path) -> None:
    (folder / "train" / "bee" / "0.png").write_bytes(b"broken")  # the seventh: the sample is 0 and 6
    (folder / "val" / "ant" / "5.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2 of 14 images \(checked so far, of 24\) do not decode"):
        load_data(section(folder, "refuse"), seed=0)
    found = load_data(section(folder, "skip"), seed=0)
    assert (len(found.train), len(found.validation)) == (11, 11)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_file_stands_for_a_broken_one(folder: Path, workers: int) -> None:
    whole = load_data(section(folder, "skip"), seed=0).train
    images_of = [whole[index][0] for index in range(12)]
    for name in ("ant/3.png", "ant/4.png", "bee/5.png"):
        (folder / "train" / name).write_bytes(b"broken")
    told: list[str] = []
    found = load_data(section(folder, "skip"), seed=0).train
    (batch,) = batches(found, [list(range(12))], workers, pin=False, told=told.append)
    taken = [0, 1, 2, 5, 5, 5, 6, 7, 8, 9, 10, 0]  # the last one's next is the first
    assert torch.equal(batch.images, torch.stack([images_of[index] for index in taken]))
    assert batch.labels.tolist() == [0] * 6 + [1] * 5 + [0]
    assert {Path(text.partition(":")[0]).name for text in told} == {"3.png", "4.png", "5.png"}


def test_a_folder_of_broken_files_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_data(section(folder, "skip"), seed=0).train
    monkeypatch.setattr(data, "MAX_REPLACED", 3)
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DataError, match="3 images in a row do not decode"):
        found[0]


def test_training_names_each_once(folder: Path, make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (folder / "train" / "ant" / "3.png").write_bytes(b"broken")
    told: list[dict[str, Any]] = []
    (tmp_path / "out").mkdir()
    source = {"source": f"imagefolder:{folder}", "bad_images": "skip", "batch": 4}
    recipe = make_recipe(data=source, train={"pretrain_epochs": 1, "epochs": 1})
    train(recipe, tmp_path / "out", tmp_path / "state", Events(listeners=[told.append]))
    texts = [event["text"] for event in told if event["kind"] == "warning"]
    assert len(texts) == 2
    assert "ant/3.png: not an image" in texts[0]
    assert texts[0].endswith("Its neighbour stands for it.")
    assert texts[1] == "1 image(s) met in this epoch do not decode"
