from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slope_compile.train.detection.task import DetectionBatch, DetectionMeter
from slope_compile.train.validation import Detected, Matches, Objects
from slope_compile.verify.metric.average_precision import (
    RESAMPLES,
    drop_interval,
    mean_average_precision,
    metric_interval,
    plain,
    resampled,
)
from slope_compile.verify.metric.bootstrap import unseen

SIDE, CLASSES, IMAGES = 32, 3, 40
Scene = tuple[dict[str, Tensor], dict[str, Tensor]]  # what is there, what is found
Measured = tuple[dict[str, float], Detected]


def filled(boxes: Tensor) -> Tensor:
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return masks


def scene(rng: np.random.Generator, index: int) -> Scene:
    """Up to four objects, some of them crowds; most are found, more or less exactly, and two things that are none."""
    count = 0 if index == 0 else int(rng.integers(0, 5))
    corner, size = rng.integers(0, 18, (count, 2)), rng.integers(5, 14, (count, 2))
    boxes = torch.tensor(np.concatenate([corner, corner + size], axis=1)).float().reshape(-1, 4)
    labels = torch.tensor(rng.integers(1, CLASSES + 1, count))
    there = {
        "boxes": boxes, "labels": labels, "iscrowd": torch.tensor(rng.random(count) < 0.15).long(),
        "masks": filled(boxes), "area": filled(boxes).flatten(1).sum(1).float(),
    }  # fmt: skip
    kept = torch.tensor(rng.random(count) < 0.85)
    moved = boxes[kept] + torch.tensor(rng.integers(-1, 2, (int(kept.sum()), 4)))
    corner = rng.integers(0, 18, (2, 2))
    none = torch.tensor(np.concatenate([corner, corner + 8], axis=1)).float()
    found = torch.cat([moved, none]).clamp(0, SIDE)
    narrower = found.clone()
    narrower[:, 2] -= 1
    return there, {
        "boxes": found,
        "labels": torch.cat([labels[kept], torch.tensor(rng.integers(1, CLASSES + 1, 2))]),
        "scores": torch.tensor(rng.random(len(found)), dtype=torch.float32),
        "masks": filled(narrower).float()[:, None],
    }


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(3)
    return [scene(rng, index) for index in range(IMAGES)]


def measure(scenes: Sequence[Scene]) -> Measured:
    """torchmetrics' own figures, and what was matched on the way."""
    meter = DetectionMeter(masks=True)
    batch = DetectionBatch(torch.zeros(len(scenes), 3, SIDE, SIDE), [there for there, _ in scenes])
    meter.update([found for _, found in scenes], batch)
    return meter.compute(), meter.answers()


@pytest.fixture(scope="module")
def whole(scenes: list[Scene]) -> Measured:
    return measure(scenes)


def evaluated(monkeypatch: pytest.MonkeyPatch, scenes: Sequence[Scene]) -> dict[str, float]:
    """pycocotools' own figures: torchmetrics rounds them to float32."""
    kept: dict[str, Any] = {}
    take = "slope_compile.train.detection.matches.MatchingBackend.take"
    monkeypatch.setattr(take, lambda backend, items: kept.update(backend._done))
    meter = DetectionMeter(masks=True)
    batch = DetectionBatch(torch.zeros(len(scenes), 3, SIDE, SIDE), [there for there, _ in scenes])
    meter.update([found for _, found in scenes], batch)
    meter.compute()
    return {"box": float(kept["bbox"].stats[0]), "mask": float(kept["segm"].stats[0])}


def test_each_image_once_gives_the_evaluations_own_figures(
    scenes: list[Scene], whole: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, answers = whole
    exact = evaluated(monkeypatch, scenes)
    assert exact["box"] != exact["mask"] and min(exact.values()) > 0.1
    for kind, value in exact.items():
        assert plain(answers, kind) == pytest.approx(value, abs=1e-12)
        assert figures[f"{kind}_map"] == pytest.approx(value, abs=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_is_what_evaluating_the_drawn_images_gives(scenes: list[Scene], whole: Measured, seed: int) -> None:
    drawn = np.sort(np.random.default_rng(seed).integers(0, IMAGES, IMAGES))
    figures, _ = measure([scenes[index] for index in drawn])
    _, answers = whole
    weights = np.bincount(drawn, minlength=IMAGES)[None]
    for kind in ("box", "mask"):
        assert mean_average_precision(answers, kind, weights)[0] == pytest.approx(figures[f"{kind}_map"], abs=1e-7)


def test_a_class_that_is_not_drawn_does_not_count_and_nothing_to_find_has_no_figure() -> None:
    found = Detected(3, objects([0, 1], [1, 2]), {"box": matches([0, 1], [1, 2], [1023, 0])})
    values = mean_average_precision(found, "box", np.array([[1, 1, 1], [2, 0, 1], [0, 3, 0], [0, 0, 3]]))
    assert values[:3] == pytest.approx([0.5, 1.0, 0.0]) and np.isnan(values[3])
    nothing = Detected(2, objects([0], [1]), {"box": matches([], [], [])})
    assert plain(nothing, "box") == 0


def objects(image: list[int], label: list[int]) -> Objects:
    return Objects(*(np.array(column, np.int32) for column in (image, label, [1] * len(image))))


def matches(image: list[int], label: list[int], matched: list[int]) -> Matches:
    columns = (image, label, [0.5] * len(image), matched, [0] * len(image))
    types = (np.int32, np.int32, np.float32, np.int16, np.int16)
    return Matches(*(np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)))


def test_large_resamples_are_worked_off_in_parts(whole: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    _, answers = whole
    at_once = resampled({"a": answers}, "box")["a"]
    assert at_once.shape == (RESAMPLES,) and at_once.std() > 0.01
    monkeypatch.setattr("slope_compile.verify.metric.average_precision.AT_ONCE", 10_000)
    assert np.array_equal(resampled({"a": answers}, "box")["a"], at_once)


def test_both_models_are_scored_on_the_same_draws(whole: Measured) -> None:
    """Models that answer alike differ in no draw; the interval is then what so many images can exclude, no less."""
    _, answers = whole
    drawn = resampled({"a": answers, "b": answers}, "mask")
    found = drop_interval(drawn["a"], drawn["b"], 0.0, answers.objects)
    with_objects = len(np.unique(answers.objects.image))
    assert with_objects < IMAGES
    assert (found.low, found.high) == (-unseen(with_objects), unseen(with_objects))
    own, value = metric_interval(drawn["a"], plain(answers, "mask"), answers.objects), plain(answers, "mask")
    assert 0 <= own.low <= value - unseen(with_objects) and value + unseen(with_objects) <= own.high <= 1
