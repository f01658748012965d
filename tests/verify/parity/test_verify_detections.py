from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slope_compile.verify.parity.outputs import Difference, compare
from slope_compile.verify.parity.tolerance import Tolerance

STRICT, COARSE = Tolerance(1e-5, "float32"), Tolerance(2e-3, "TF32")
Arrays = dict[str, Any]


def found(images: int = 4, most: int = 10, count: int = 8, seed: int = 0) -> Arrays:
    """Detections of some images, `count` in each, padded with zeros to `most`."""
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 60, (images, most, 2))
    boxes = np.concatenate([corner, corner + random.uniform(10, 40, (images, most, 2))], -1)
    scores = -np.sort(-random.uniform(0.1, 1, (images, most)), axis=1)
    there = np.arange(most) < count
    return {
        "boxes": (boxes * there[:, None]).astype(np.float32),
        "labels": (random.integers(1, 4, (images, most)) * there).astype(np.int64),
        "scores": (scores * there).astype(np.float32),
        "masks": (random.uniform(size=(images, most, 7, 7)) * there[:, None, None]).astype(np.float32),
    }


def judged(change: Callable[[Arrays], None], tolerance: Tolerance = STRICT, **settings: int) -> Difference:
    reference, tested = found(**settings), found(**settings)
    change(tested)
    return compare([reference], [tested], tolerance)


def swap(arrays: Arrays, image: int, a: int, b: int) -> None:
    for values in arrays.values():
        values[image, [a, b]] = values[image, [b, a]]


def drop_last(arrays: Arrays) -> None:
    for values in arrays.values():
        values[0, 7] = 0


def test_the_same_detections_are_the_same() -> None:
    same = judged(lambda arrays: None)
    assert same.within and same.max_abs == 0 and same.top1 is None
    assert same.figures()["detections"] == 64 and same.figures()["off"] == 0


def test_scores_that_tie_may_change_places() -> None:
    def tie(arrays: Arrays) -> None:
        arrays["scores"][1, 3] = arrays["scores"][1, 2]

    reference, tested = found(), found()
    tie(reference)
    tie(tested)
    swap(tested, 1, 2, 3)
    tested["scores"][1, 2] -= np.float32(2e-6)
    assert compare([reference], [tested], STRICT).within


def test_detections_out_of_order_fail() -> None:
    difference = judged(lambda arrays: swap(arrays, 1, 0, 7))
    assert not difference.within
    assert "not sorted" in difference.told(STRICT)


def shift(name: str, by: float) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][2, 1] += by

    return change


def relabel(arrays: Arrays) -> None:
    arrays["labels"][0, 0] = arrays["labels"][0, 0] % 3 + 1


def another_box_twice(arrays: Arrays) -> None:
    for values in arrays.values():
        values[3, 1] = values[3, 0]


@pytest.mark.parametrize(
    "change",
    [shift("boxes", 0.01), shift("boxes", 30), shift("scores", -1e-3), shift("masks", 1e-3), relabel, drop_last,
     another_box_twice],
    ids=["box", "other box", "score", "mask", "label", "lost", "twice"],
)  # fmt: skip
def test_one_detection_that_differs_is_too_many_among_few(change: Callable[[Arrays], None]) -> None:
    difference = judged(change)
    assert not difference.within
    assert "of 6" in difference.told(STRICT)


def test_a_mask_of_another_detection_fails() -> None:
    def exchange(arrays: Arrays) -> None:
        arrays["masks"][0, [0, 1]] = arrays["masks"][0, [1, 0]]

    assert not judged(exchange).within


def test_one_in_a_hundred_may_be_decided_otherwise_and_one_in_ten_where_arithmetic_is_coarse() -> None:
    assert judged(drop_last, images=20).within
    assert not judged(drop_last, images=6).within
    assert judged(drop_last, COARSE, images=6).within


def test_what_is_beyond_the_count_must_be_zero() -> None:
    def leave(arrays: Arrays) -> None:
        arrays["boxes"][0, 9] = 1

    difference = judged(leave)
    assert not difference.within and "beyond" in difference.told(STRICT)


def test_everything_lost_fails_and_nothing_found_is_said() -> None:
    def clear(arrays: Arrays) -> None:
        for values in arrays.values():
            values[:] = 0

    assert not judged(clear).within
    assert judged(lambda arrays: None, count=0).figures()["detections"] == 0


def test_images_are_told_apart() -> None:
    def exchange(arrays: Arrays) -> None:
        for values in arrays.values():
            values[[0, 1]] = values[[1, 0]]

    assert not judged(exchange).within
