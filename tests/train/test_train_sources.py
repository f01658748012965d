from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from train_files import write_image

from slope_compile.errors import DataError, ModelError
from slope_compile.recipe import Recipe
from slope_compile.train.sources import Source, list_folder, parse_source, source_digests


def test_sources_are_parsed() -> None:
    assert parse_source("digits") == Source("digits")
    assert parse_source("fake:64") == Source("fake", items=64)
    assert parse_source("imagefolder:some/dir") == Source("imagefolder", folder=Path("some/dir"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("digit", "Did you mean 'digits'"),
        ("imgfolder:x", "Did you mean 'imagefolder:DIR'"),
        ("digits:3", "no argument"),
        ("fake", "N must be 20"),
        ("fake:abc", "N must be 20"),
        ("fake:19", "N must be 20"),
        ("fake:99999999999999999999", "N must be 20"),
        ("fake:-5", "N must be 20"),
        ("imagefolder:", "names no folder"),
    ],
)
def test_a_wrong_source_is_named_with_the_remedy(text: str, said: str) -> None:
    with pytest.raises(DataError) as error:
        parse_source(text)
    assert text in str(error.value)
    assert said in str(error.value)


def test_class_folders_are_listed_in_order_without_strangers(image_folder: Path) -> None:
    (image_folder / ".hidden").mkdir()
    (image_folder / "__MACOSX").mkdir()
    (image_folder / "ant" / "notes.txt").write_text("no image")
    write_image(image_folder / "bee" / "deeper" / "z.PNG")
    listing = list_folder(image_folder)
    assert listing.classes == ("ant", "bee")
    assert listing.validation is None
    assert [Path(file.path).name for file in listing.train] == [f"{i}.png" for i in range(5)] * 2 + ["z.PNG"]
    assert [file.label for file in listing.train] == [0] * 5 + [1] * 6


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_split_of_the_folders_own_is_kept(image_folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(image_folder, tmp_path / "split" / "train")
    shutil.copytree(image_folder, tmp_path / "split" / name)
    listing = list_folder(tmp_path / "split")
    assert listing.validation is not None
    assert len(listing.train) == len(listing.validation) == 10
    assert all(f"/{name}/" in file.path for file in listing.validation)


def test_a_lone_train_folder_is_split(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "lone" / "train")
    listing = list_folder(tmp_path / "lone")
    assert listing.classes == ("ant", "bee")
    assert listing.validation is None


def test_missing_empty_and_classless_folders_are_named(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist"):
        list_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"0\.png is not a folder"):
        list_folder(image_folder / "ant" / "0.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        list_folder(tmp_path / "empty")
    with pytest.raises(DataError, match="no class folders"):
        list_folder(image_folder / "ant")
    (image_folder / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no image"):
        list_folder(image_folder)
    shutil.rmtree(image_folder / "cat")
    shutil.rmtree(image_folder / "bee")
    with pytest.raises(DataError, match="single class folder, 'ant'"):
        list_folder(image_folder)


def test_class_folders_that_differ_are_named_on_either_side(image_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(image_folder, tmp_path / "split" / "train")
    shutil.copytree(image_folder, tmp_path / "split" / "val")
    (tmp_path / "split" / "val" / "bee").rename(tmp_path / "split" / "val" / "bees")
    with pytest.raises(DataError) as error:
        list_folder(tmp_path / "split")
    assert "train alone has 'bee'" in str(error.value)
    assert "val alone has 'bees'" in str(error.value)


def test_digests_follow_what_training_reads(
    make_recipe: Callable[..., Recipe], image_folder: Path, net_file: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"one")
    recipe = make_recipe(
        data={"source": f"imagefolder:{image_folder}"}, model={"weights": str(weights), "name": f"{net_file}:net"}
    )
    first = source_digests(recipe)
    assert sorted(first) == ["data.source files", "model.name file", "model.weights file"]
    assert source_digests(recipe) == first
    write_image(image_folder / "ant" / "9.png")
    net_file.write_text(net_file.read_text() + "\n")
    weights.write_bytes(b"two")
    second = source_digests(recipe)
    assert all(first[name] != second[name] for name in first)
    weights.unlink()
    with pytest.raises(ModelError, match=r"no file .*w\.safetensors"):
        source_digests(recipe)
