from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_files import DETECTOR, detection_recipe
from torch import Tensor

from slope_compile.errors import DataError, ModelError, RecipeError
from slope_compile.events import Events
from slope_compile.train.data import load_data
from slope_compile.train.detection.task import Detection, DetectionBatch, DetectionMeter
from slope_compile.train.loop import train
from slope_compile.train.models import build_model
from slope_compile.train.tasks import make_task
from slope_compile.train.trained import load_trained

SIDE = 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "detector.py"
    path.write_text(DETECTOR)
    return path


def boxes(*corners: tuple[int, int, int, int]) -> Tensor:
    return torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)


def filled(found: Tensor) -> Tensor:
    """Masks that fill their boxes, uint8 [k, SIDE, SIDE]."""
    masks = torch.zeros(len(found), SIDE, SIDE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, found.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return masks


def target(found: Tensor, labels: list[int], crowd: list[int]) -> dict[str, Tensor]:
    masks = filled(found)
    return {
        "boxes": found, "labels": torch.tensor(labels), "iscrowd": torch.tensor(crowd), "masks": masks,
        "area": masks.flatten(1).sum(1).float(),
    }  # fmt: skip


def answer(found: Tensor, masked: Tensor, labels: list[int], scores: list[float]) -> dict[str, Tensor]:
    masks = 0.9 * filled(masked).float()[:, None] + 0.05
    return {"boxes": found, "labels": torch.tensor(labels), "scores": torch.tensor(scores), "masks": masks}


def test_mean_average_precision_by_hand() -> None:
    """Class 1: of two objects one is found, at IoU 0.81; class 2: found exactly, after a surer wrong one.

    Class 1: recall 1/2 at precision 1 up to IoU 0.80: 51 of 101 recall points, so AP = 51/101 for the 7 thresholds
    0.50 … 0.80 and 0 for 0.85 … 0.95. Class 2: precision 1/2 at recall 1, so AP = 1/2 at every threshold. Its mask is
    found at IoU 0.54: AP = 1/2 at one threshold of ten. The crowd takes its detection out of the count.
    """
    truth = target(
        boxes((0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30), (16, 16, 32, 32)), [1, 1, 2, 2], [0, 0, 0, 1]
    )
    found = boxes((0, 0, 9, 9), (20, 11, 30, 15), (0, 20, 10, 30), (17, 17, 31, 31))
    masked = boxes((0, 0, 9, 9), (20, 11, 30, 15), (0, 20, 9, 26), (17, 17, 31, 31))
    meter = DetectionMeter(masks=True)
    batch = DetectionBatch(torch.zeros(1, 3, SIDE, SIDE), [truth])
    meter.update([answer(found, masked, [1, 2, 2, 2], [0.9, 0.8, 0.7, 0.6])], batch)
    figures = meter.compute()
    first = 51 / 101
    assert figures["box_map"] == pytest.approx((0.7 * first + 0.5) / 2, abs=1e-4)
    assert figures["box_map_50"] == pytest.approx((first + 0.5) / 2, abs=1e-4)
    assert figures["mask_map"] == pytest.approx((0.7 * first + 0.05) / 2, abs=1e-4)
    assert figures["mask_map_75"] == pytest.approx(first / 2, abs=1e-4)
    assert figures["items"] == 1


def test_without_masks_boxes_are_the_metric_and_nothing_to_find_is_an_error() -> None:
    assert (Detection(masks=True).metric, Detection(masks=False).metric) == ("mask_map", "box_map")
    meter = DetectionMeter(masks=False)
    found = {"boxes": boxes((0, 0, 8, 8)), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    meter.update([found], DetectionBatch(torch.zeros(1, 3, SIDE, SIDE), [target(boxes((0, 0, 8, 8)), [1], [0])]))
    assert meter.compute() == {"box_map": 1.0, "box_map_50": 1.0, "box_map_75": 1.0, "items": 1}
    empty = DetectionMeter(masks=False)
    empty.update([found], DetectionBatch(torch.zeros(1, 3, SIDE, SIDE), [target(boxes(), [], [])]))
    with pytest.raises(DataError, match="no object at this size"):
        empty.compute()


def test_a_batch_splits_and_moves_with_its_targets(file: Path) -> None:
    data = load_data(detection_recipe(file).data, 0)
    batch = Detection(masks=True).collate([data.train[index] for index in range(5)])
    parts = batch.split(2)
    assert [len(part) for part in parts] == [3, 2] and [len(part.images) for part in parts] == [3, 2]
    assert torch.equal(parts[1].targets[0]["boxes"], data.train[3][1]["boxes"])
    half = batch.to(torch.device("cpu"), torch.channels_last)
    assert half.images.is_contiguous(memory_format=torch.channels_last) and len(half) == 5


def test_model_and_data_of_different_kinds_are_refused(file: Path) -> None:
    def task_of(function: str, **sections: Any) -> Any:
        recipe = detection_recipe(file, function, **sections)
        data = load_data(recipe.data, 0)
        return make_task(recipe, data, build_model(recipe.model, len(data.classes), recipe.data.size))

    with pytest.raises(ModelError, match=r"classifier is a classification model, but shapes:16 is detection data"):
        task_of("classifier")
    with pytest.raises(ModelError, match=r"detector is a detection model, but fake:20 is classification data"):
        task_of("detector", data={"source": "fake:20"})
    with pytest.raises(RecipeError, match="label_smoothing is for classification"):
        task_of("detector", train={"label_smoothing": 0.1})
    assert task_of("boxes_only").metric == "box_map" and task_of("detector").metric == "mask_map"


def test_training_writes_the_detectors_figures_and_its_checkpoint_loads(file: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    out.mkdir(), state.mkdir()
    recipe = detection_recipe(file, data={"augment": "light"})
    train(recipe, out, state, Events())
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["metric"] == "mask_map" and metrics["data"] == {"train": 13, "validation": 3}
    figures = {f"{kind}_map{suffix}" for kind in ("box", "mask") for suffix in ("", "_50", "_75")}
    assert set(metrics["fp32"]) == set(metrics["compressed"]) == figures
    assert all(figures <= set(epoch) and "validation_loss" not in epoch for epoch in metrics["epochs"])
    plan = {row["name"]: (row["bits"], row["pattern"], row["reason"]) for row in metrics["plan"]}
    assert plan["backbone.3.weight".removesuffix(".weight")] == (4, "2:4", "the general rule")
    predictions = {name for name, row in plan.items() if row[2] == "prediction layer of a detector"}
    assert {name.rpartition(".")[2] for name in predictions} | {"bbox_pred"} == {
        "cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits",
    }  # fmt: skip
    assert all(plan[name][:2] == (8, None) for name in predictions)
    model = load_trained(recipe, out)
    with torch.inference_mode():
        (found,) = model(load_data(recipe.data, 0).validation[0][0][None])
    assert found["masks"].shape[1:] == (1, 64, 64)


def test_ranks_with_different_numbers_of_images_agree_on_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r of two has images r, r + 2, …: the first has two images and the second one."""
    generator = torch.Generator().manual_seed(0)
    truths = [target(boxes((0, 0, 10, 10), (12, 12, 20, 30)), [1, 2], [0, 0]) for _ in range(3)]
    answers = []
    for truth in truths:
        moved = (truth["boxes"] + torch.randint(0, 4, (2, 4), generator=generator)).clamp(max=SIDE)
        answers.append(answer(moved, moved, [1, 2], torch.rand(2, generator=generator).tolist()))
    whole, ranks = DetectionMeter(True), [DetectionMeter(True), DetectionMeter(True)]
    for index, (found, truth) in enumerate(zip(answers, truths, strict=True)):
        for meter in (whole, ranks[index % 2]):
            meter.update([found], DetectionBatch(torch.zeros(1, 3, SIDE, SIDE), [truth]))
    expected = whole.compute()
    states = [{name: list(getattr(m._metric, name)) for name in m._metric._defaults} for m in ranks]

    def all_gather_object(found: list[Any], mine: dict[str, Any]) -> None:
        found[:] = states

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    assert [meter.compute() for meter in ranks] == [expected, expected] and expected["items"] == 3
    assert 0 < expected["mask_map"] < 1
