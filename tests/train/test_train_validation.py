"""validation.safetensors: what single items were answered, complete and in order, and nothing damaged is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.recipe import Recipe
from slope_compile.train.data import load_data
from slope_compile.train.loop import train
from slope_compile.train.tasks import ClassificationMeter, ImageBatch
from slope_compile.train.trained import METRICS, load_trained, measure
from slope_compile.train.validation import (
    FILE,
    HEADER,
    Classified,
    Detected,
    Matches,
    Objects,
    flatten,
    load_record,
    save_record,
    unflatten,
)


def test_training_records_what_both_models_answer(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe(
        data={"source": "fake:300", "augment": "none"}, train={"pretrain_epochs": 3, "epochs": 1, "lr": 0.1}
    )
    out = tmp_path / "out"
    out.mkdir()
    train(recipe, out, tmp_path / "state", Events())
    record, validation = load_record(out / FILE), load_data(recipe.data, 0).validation
    model, compressed = load_trained(recipe, out), record["compressed"]
    assert isinstance(compressed, Classified) and isinstance(record["fp32"], Classified)
    images = torch.stack([validation[index][0] for index in range(len(validation))])
    assert compressed.predictions.tolist() == model(images).argmax(1).tolist()
    assert (
        compressed.labels.tolist()
        == record["fp32"].labels.tolist()
        == [validation[index][1] for index in range(len(validation))]
    )
    assert record["fp32"].predictions.tolist() != compressed.predictions.tolist()
    metrics = json.loads((out / METRICS).read_text())
    for name, found in record.items():
        assert np.mean(found.right) == pytest.approx(metrics[name]["accuracy"]), name  # type: ignore[union-attr]
    figures, answers = measure(model, validation, batch=3)
    assert np.array_equal(answers.right, compressed.right)  # type: ignore[union-attr]
    assert figures["accuracy"] == pytest.approx(compressed.right.mean())


def test_ranks_answers_come_in_the_order_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank r of three has items r, r + 3, …; eleven items leave the last rank one fewer."""
    labels = torch.arange(11)
    scores = torch.nn.functional.one_hot((labels + (labels % 2)) % 11, 11).float()
    ranks = []
    for rank in range(3):
        meter = ClassificationMeter(torch.device("cpu"))
        for part in torch.arange(11)[rank::3].split(2):
            meter.update(scores[part], ImageBatch(torch.zeros(len(part), 3, 1, 1), labels[part]))
        ranks.append(meter)
    seen = [torch.cat(meter._seen, dim=1).numpy() for meter in ranks]

    def all_gather_object(found: list[Any], mine: Any) -> None:
        found[:] = seen

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    for meter in ranks:
        answers = meter.answers()
        assert answers.labels.tolist() == list(range(11))
        assert answers.predictions.tolist() == scores.argmax(1).tolist()
        assert answers.right.tolist() == [label % 2 == 0 for label in range(11)]


def test_a_rank_without_items_has_answered_nothing() -> None:
    assert ClassificationMeter(torch.device("cpu")).answers().items == 0


CLASSES = Classified(np.array([0, 1, 2], np.int32), np.array([0, 2, 2], np.int32))


def detected(**changes: Any) -> Detected:
    columns = {
        "image": np.array([0, 1], np.int32), "label": np.array([1, 2], np.int32),
        "score": np.array([0.5, 0.25], np.float32), "matched": np.array([1023, 0], np.int16),
        "ignored": np.array([0, 4], np.int16), **changes,
    }  # fmt: skip
    objects = Objects(*(np.array(column, np.int32) for column in ([0, 2], [1, 1], [1, 3])))
    return Detected(3, objects, {"box": Matches(**columns), "mask": Matches(**columns)})


@pytest.mark.parametrize("answers", [CLASSES, detected()], ids=["classes", "detections"])
def test_what_is_written_is_read_again(tmp_path: Path, answers: Classified | Detected) -> None:
    save_record(tmp_path / FILE, answers, answers)
    first = (tmp_path / FILE).read_bytes()
    record = load_record(tmp_path / FILE)
    for model in ("fp32", "compressed"):
        expected, found = flatten({model: answers}), flatten({model: record[model]})
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[name], found[name]) for name in expected)
        assert type(unflatten(found, model)) is type(answers)
    save_record(tmp_path / FILE, record["fp32"], record["compressed"])
    assert (tmp_path / FILE).read_bytes() == first
    assert {name.partition(".")[0] for name in load_file(tmp_path / FILE)} == {"items", "truth", "fp32", "compressed"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.array([0, 3], np.int32)}, "image from 0 to 3, not 0 to 2"),
        ({"image": np.array([-1, 1], np.int32)}, "image from -1 to 1"),
        ({"label": np.array([1], np.int32)}, "lengths differ"),
        ({"score": np.array([0.5, np.nan], np.float32)}, "a score is not finite"),
        ({"matched": np.array([1024, 0], np.int16)}, "matched from 0 to 1024"),
        ({"matched": np.array([0, 4], np.int16)}, "both right and left out"),
    ],
)
def test_impossible_detections_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        detected(**changes)


def test_a_file_that_is_not_a_record_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / FILE

    def refused(message: str) -> None:
        with pytest.raises(ArtifactError, match=message) as error:
            load_record(path)
        assert "slope-compile train" in error.value.remedy and str(path) in error.value.problem

    refused("does not exist")
    save_record(path, CLASSES, CLASSES)
    whole, tensors = path.read_bytes(), load_file(path)
    path.write_bytes(whole[:-3])
    refused("no record of validation")
    for name, damaged, message in (
        ("fp32.predictions", tensors["fp32.predictions"][1:], "lengths differ"),
        ("fp32.predictions", tensors["fp32.predictions"].astype(np.float32), "is float32"),
        ("truth.labels", tensors["truth.labels"][None], r"truth.labels is int32 \[1, 3\]"),
        ("items", np.array([4], np.int64), "3 labels for 4 items"),
        ("items", np.array([-1], np.int64), "no number of images"),
    ):
        save_file({**tensors, name: np.ascontiguousarray(damaged)}, path, metadata=HEADER)
        refused(message)
    save_file({name: array for name, array in tensors.items() if name != "items"}, path, metadata=HEADER)
    refused("items")
    save_file(tensors, path, metadata={"format": "2"})
    refused("its header")
    path.unlink()
    path.mkdir()
    refused("no record of validation")


def test_a_file_beyond_any_record_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(2_000_000_000)  # sparse: it takes no room
    with pytest.raises(ArtifactError, match="larger than"):
        load_record(tmp_path / FILE)
