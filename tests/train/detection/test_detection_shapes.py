from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.errors import DataError
from slope_compile.recipe import DataSection
from slope_compile.train.data import load_data
from slope_compile.train.detection import shapes
from slope_compile.train.detection.shapes import CLASSES, draw_shapes, write_shapes

INDICES, SIZES = st.integers(0, 10_000), st.integers(16, 72)


@settings(max_examples=40, deadline=None)
@given(INDICES, SIZES)
def test_boxes_are_the_masks_extents_and_masks_are_apart(index: int, size: int) -> None:
    image, found = draw_shapes(index, size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    covered = np.zeros((size, size), dtype=int)
    for shape in found:
        rows, columns = np.nonzero(shape.mask)
        assert shape.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert 1 <= shape.label <= len(CLASSES) and set(np.unique(shape.mask)) <= {0, 1}
        covered += shape.mask
    assert covered.max() <= 1  # what can be seen of one shape is not seen of another


def test_images_depend_on_index_and_seed_alone() -> None:
    first, _ = draw_shapes(3, 32)
    draw_shapes(4, 32)
    assert np.array_equal(first, draw_shapes(3, 32)[0])
    assert not np.array_equal(first, draw_shapes(3, 32, seed=1)[0])
    assert not np.array_equal(first, draw_shapes(4, 32)[0])


def test_later_shapes_cover_earlier_ones_and_the_hidden_ones_are_gone() -> None:
    whole = {}

    def remember(draw: np.random.Generator, label: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        whole[len(whole)] = (label, outline(draw, label, x, y))
        return whole[len(whole) - 1][1]

    outline = shapes._outline
    partly = hidden = 0
    for index in range(40):
        whole.clear()
        with patch.object(shapes, "_outline", remember):
            _, found = draw_shapes(index, 48)
        expected = []
        for position, (label, mask) in whole.items():
            later = np.any([other for p, (_, other) in whole.items() if p > position] or [mask & False], axis=0)
            visible = mask & ~later
            if visible.sum() >= shapes.VISIBLE * mask.sum():
                expected.append((label, visible))
                partly += bool(visible.sum() < mask.sum())
            else:
                hidden += 1
        assert [shape.label for shape in found] == [label for label, _ in expected]
        assert all(np.array_equal(s.mask, visible) for s, (_, visible) in zip(found, expected, strict=True))
    assert partly > 10 and hidden > 0


def test_a_set_has_all_classes_and_images_without_any() -> None:
    drawn = [draw_shapes(index, 32)[1] for index in range(120)]
    assert {shape.label for found in drawn for shape in found} == set(range(1, len(CLASSES) + 1))
    assert 0 < sum(not found for found in drawn) < 24


@pytest.mark.parametrize("augment", ["none", "light"])
def test_the_written_folder_holds_what_is_drawn(tmp_path: Path, augment: str) -> None:
    write_shapes(tmp_path, 10, 48, validation=0.3)
    keys = {"size": 64, "augment": augment, "validation": 0.3}
    drawn = load_data(DataSection(source="shapes:10", **{**keys, "size": 48}), 0)
    read = load_data(DataSection(source=f"coco:{tmp_path}", **{**keys, "size": 48}), 0)
    assert read.classes == drawn.classes == list(CLASSES)
    for ours, theirs in ((drawn.train, read.train), (drawn.validation, read.validation)):
        assert len(ours) == len(theirs)
        for index in range(len(ours)):
            (image, target), (other, others) = ours[index], theirs[index]
            assert torch.equal(image, other) and target.keys() == others.keys()
            assert all(torch.equal(target[key], others[key]) for key in target)


def test_augmented_targets_fit_their_images_and_repeat_with_seed_and_epoch() -> None:
    train = load_data(DataSection(source="shapes:40", size=64), 1).train
    seen = []
    for index in range(len(train)):
        image, target = train[index]
        boxes, masks = target["boxes"], target["masks"]
        assert image.shape == (3, 64, 64) and masks.shape == (len(boxes), 64, 64)
        assert boxes.min() >= 0 if len(boxes) else True
        assert (boxes <= 64).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        for box, mask in zip(boxes, masks, strict=True):
            rows, columns = torch.nonzero(mask, as_tuple=True)
            x0, y0, x1, y1 = box.tolist()
            assert columns.min() >= x0 - 1 and columns.max() <= x1 and rows.min() >= y0 - 1 and rows.max() <= y1
        seen.append(image)
    assert torch.equal(train[0][0], seen[0])
    train.set_epoch(1)
    assert not torch.equal(train[0][0], seen[0])
    train.set_epoch(0)
    assert torch.equal(train[0][0], seen[0])


def test_too_few_shapes_are_refused() -> None:
    with pytest.raises(DataError, match="N must be 8 to"):
        load_data(DataSection(source="shapes:7", size=64), 0)
