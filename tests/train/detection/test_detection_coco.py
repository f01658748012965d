from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_files import coco_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as reference

from slope_compile.errors import DataError, RecipeError
from slope_compile.recipe import DataSection
from slope_compile.train.data import Data, load_data
from slope_compile.train.detection.masks import draw, parse_segmentation, run_lengths
from slope_compile.train.sources import find_coco

Change = Callable[[dict[str, Any]], Any]
BITMAPS = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 1))


def opened(folder: Path, **keys: Any) -> Data:
    return load_data(DataSection(**{"source": f"coco:{folder}", "size": 64, "augment": "none", **keys}), 0)


def annotation(index: int, **keys: Any) -> Change:
    return lambda document: document["annotations"][index].update(keys)


def test_a_folder_becomes_letterboxed_images_with_contiguous_labels(tmp_path: Path) -> None:
    data = opened(coco_folder(tmp_path))
    assert data.kind == "detection" and data.classes == ["car", "toothbrush"]  # by id: 3, then 90
    assert len(data.train) == len(data.validation) == 2
    image, target = data.validation[0]
    assert image.shape == (3, 64, 64) and image.dtype == torch.float32
    assert image[:, 48:].abs().max() < 0.02  # 40 x 30 at 64 x 48: the rest is the mean colour
    assert target["labels"].tolist() == [2, 1] and target["iscrowd"].tolist() == [0, 1]
    assert torch.allclose(target["boxes"], 1.6 * torch.tensor([[4.0, 5, 14, 13], [0, 0, 2, 30]]))
    assert target["masks"].shape == (2, 64, 64)
    assert target["area"][1] == 4 * 48  # 2 columns, 1.6 times as wide, by the nearest pixel
    rows, columns = np.nonzero(target["masks"][0].numpy())
    assert abs(rows.min() - 8) <= 1 and abs(rows.max() - 20) <= 1 and abs(columns.min() - 6) <= 1
    # Crowds are not learnt from, and an image with nothing in it is one all the same.
    assert data.train[0][1]["labels"].tolist() == [2]
    empty = data.train[1][1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 64, 64)


BAD_ANNOTATIONS = {
    "outside": ({"bbox": [38, 5, 10, 8]}, r"annotation 1: its box \[38, 5, 10, 8\] is not inside its image of 40 x 30"),
    "no area": ({"bbox": [4, 5, 0, 8]}, "annotation 1: its box .* has no area"),
    "length": ({"bbox": [4, 5, 10]}, r"annotation 1: its box is \[4, 5, 10\], not x, y, width, height"),
    "nan": ({"bbox": [4, 5, math.nan, 8]}, "annotation 1: its box is .*nan"),
    "huge": ({"bbox": [4, 5, 10**400, 8]}, "annotation 1: its box is .*not x, y, width, height"),
    "missing": ({"bbox": None}, "annotation 1: its box is None"),
    "crowd": ({"iscrowd": 2}, "annotation 1: iscrowd is 2"),
    "polygon": ({"segmentation": [[1, 2, 3, 4]]}, "annotation 1: a polygon .* a list of 4"),
    "polygon nan": ({"segmentation": [[1, 2, 3, 4, 5, math.inf]]}, "annotation 1: .* no finite number"),
    "mask size": (
        {"segmentation": {"size": [40, 30], "counts": [1200]}},
        r"annotation 1: its mask has size \[40, 30\]",
    ),
    "mask sum": ({"segmentation": {"size": [30, 40], "counts": [9]}}, "annotation 1: its run lengths sum to 9"),
    "mask count": ({"segmentation": {"size": [30, 40], "counts": [-1, 1201]}}, "annotation 1: .* no count of pixels"),
    "mask text": ({"segmentation": {"size": [30, 40], "counts": "\x7f~"}}, "annotation 1: .* damaged"),
    "mask cut": ({"segmentation": {"size": [30, 40], "counts": "Pn"}}, "annotation 1: .* cut off"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_a_damaged_annotation_is_refused_by_name_or_left_out(tmp_path: Path, case: str) -> None:
    keys, message = BAD_ANNOTATIONS[case]
    good = {"id": 3, "image_id": 8, "category_id": 3, "bbox": [1, 1, 5, 5], "segmentation": [[1, 1, 6, 1, 6, 6]]}

    def change(document: dict[str, Any]) -> None:
        document["annotations"][0].update(keys)
        document["annotations"].append(good)

    folder = coco_folder(tmp_path, change)
    with pytest.raises(DataError, match=f"1 of 3 annotations are not usable: .*instances_train2017.json: {message}"):
        opened(folder)
    data = opened(folder, bad_images="skip")
    assert [data.train[i][1]["labels"].tolist() for i in range(2)] == [[], [1]]
    assert list(data.skipped) == [f"{folder}/annotations/instances_train2017.json: annotation 1"]


def rename(key: str, index: int, **values: Any) -> Change:
    return lambda document: document[key][index].update(values)


BAD_FILES: dict[str, tuple[Change, str]] = {
    "category": (annotation(0, category_id=5), "annotation 1 is of category 5, which the file does not list"),
    "image": (annotation(0, image_id=99), "annotation 1 is of image 99, which the file does not list"),
    "ids": (annotation(1, id=1), "the annotation id 1 occurs twice"),
    "image ids": (rename("images", 1, id=7), "the image id 7 occurs twice"),
    "category ids": (rename("categories", 1, id=90), "the category id 90 occurs twice"),
    "names": (rename("categories", 1, name="toothbrush"), "category 3 has the name 'toothbrush'"),
    "id": (annotation(0, id="one"), "annotation has the id 'one'"),
    "up": (rename("images", 0, file_name="../a.png"), "image 7 has the file name '../a.png'"),
    "root": (rename("images", 0, file_name="/etc/a.png"), "image 7 has the file name '/etc/a.png'"),
    "twice": (rename("images", 0, file_name="deep/b.png"), "image 8 names the file 'deep/b.png', as another"),
    "size": (rename("images", 0, width=-4), "image 7 has size -4 x 30"),
    "list": (lambda d: {**d, "annotations": {}}, "no list of 'annotations'"),
    "row": (lambda d: {**d, "images": [3]}, "a row of image has the id None"),
    "none": (lambda d: {**d, "annotations": []}, "no usable annotation"),
    "crowds": (annotation(0, iscrowd=1), "no usable annotation"),
    "nothing": (lambda d: [1], "no list of 'images'"),
    "no categories": (lambda d: {**d, "categories": []}, "names no category"),
    "others": (rename("categories", 0, name="cat"), "categories of .* differ: 90 'cat', 90 'toothbrush'"),
    "mixed": (annotation(0, segmentation=[]), "1 of 4 annotations have no segmentation"),
}


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("policy", ["refuse", "skip"])
def test_a_damaged_file_is_refused_with_its_reason(tmp_path: Path, case: str, policy: str) -> None:
    change, message = BAD_FILES[case]
    with pytest.raises(DataError, match=message):
        opened(coco_folder(tmp_path, change), bad_images=policy)


def test_images_that_are_missing_empty_or_of_another_size_are_refused_or_left_out(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    image = folder / "train2017/deep/b.png"
    shutil.copy(image, folder / "keep.png")
    for damage, message in (
        (lambda: image.unlink(), "deep/b.png: the file is gone"),
        (lambda: image.write_bytes(b""), "deep/b.png: not an image"),
        (lambda: write_other_size(image), "deep/b.png: 8 x 8 pixels, but its annotations are for 40 x 30"),
    ):
        damage()
        with pytest.raises(DataError, match=f"1 of 2 images are not usable: .*{message}"):
            opened(folder)
        data = opened(folder, bad_images="skip")
        assert len(data.train) == 1 and list(data.skipped) == [str(image)]


def write_other_size(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (8, 8)).save(path)


def test_a_strip_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    def strip(document: dict[str, Any]) -> None:
        document["images"][1].update(width=100, height=1)

    folder = coco_folder(tmp_path, strip)
    Image.new("RGB", (100, 1)).save(folder / "train2017/deep/b.png")
    with pytest.raises(DataError, match=r"100 x 1 pixels: nothing is left of one side at data\.size 64"):
        opened(folder)


def test_an_image_that_changes_after_the_check_is_an_error_of_ours(tmp_path: Path) -> None:
    data = opened(coco_folder(tmp_path))
    write_other_size(tmp_path / "train2017/a.png")
    with pytest.raises(DataError, match="8 x 8 pixels"):
        data.train[0]


def test_folders_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no training annotations"):
        opened(tmp_path)
    folder = coco_folder(tmp_path / "coco")
    (folder / "annotations/instances_train2017.json").write_text("{" * 5000)
    with pytest.raises(DataError, match="is not JSON that can be read"):
        opened(folder)
    (folder / "annotations/instances_train2014.json").write_text("{}")
    with pytest.raises(DataError, match="several of instances_train"):
        opened(folder)
    shutil.rmtree(folder / "val2017")
    (folder / "annotations/instances_train2014.json").unlink()
    with pytest.raises(DataError, match="has no images: there is neither"):
        opened(folder)


def test_other_layouts_are_found_and_a_lone_split_is_divided(tmp_path: Path) -> None:
    source = coco_folder(tmp_path / "coco")
    exported = tmp_path / "exported"
    for name, other in (("train", "train2017"), ("valid", "val2017")):
        shutil.copytree(source / other, exported / name)
        shutil.copy(source / f"annotations/instances_{other}.json", exported / name / "_annotations.coco.json")
    assert torch.equal(opened(exported).train[0][0], opened(source).train[0][0])
    (source / "images").mkdir()
    (source / "train2017").rename(source / "images/train2017")
    found = find_coco(source)
    assert found.train.images == source / "images/train2017" and found.validation is not None

    def annotate_both(document: dict[str, Any]) -> None:
        document["annotations"][1].update(image_id=8, iscrowd=0)

    alone = coco_folder(tmp_path / "alone", annotate_both)
    (alone / "annotations/instances_val2017.json").unlink()
    data = opened(alone, validation=0.5)
    assert {len(data.train), len(data.validation)} == {1}


def test_sets_with_boxes_only_have_no_masks(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path)
    for path in (folder / "annotations").iterdir():
        document = json.loads(path.read_text())
        for row in document["annotations"]:
            del row["segmentation"]
        path.write_text(json.dumps(document))
    target = opened(folder).validation[0][1]
    assert "masks" not in target
    assert target["area"].tolist() == pytest.approx([10 * 8 * 1.6**2, 2 * 30 * 1.6**2])


def test_augmentation_for_classification_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="for classification"):
        opened(coco_folder(tmp_path), augment="imagenet")


@settings(deadline=None, max_examples=50)
@given(BITMAPS)
def test_run_lengths_and_their_packed_form_draw_the_bitmap_again(bitmap: np.ndarray) -> None:
    height, width = bitmap.shape
    packed = reference.encode(np.asfortranarray(bitmap))["counts"].decode()
    for counts in (run_lengths(bitmap), packed):
        parsed = parse_segmentation({"size": [height, width], "counts": counts}, height, width)
        assert np.array_equal(draw(parsed, height, width), bitmap)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_packed_text_never_ends_in_anything_but_a_reason(text: str) -> None:
    try:
        parsed = parse_segmentation({"size": [4, 5], "counts": text}, 4, 5)
    except ValueError:
        return
    assert draw(parsed, 4, 5).shape == (4, 5)
