"""A run's record of single answers, from training to the verdict: what it adds, and what happens where it is wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from slope_compile.artifacts import FileDigest, RunFolder
from slope_compile.events import Events
from slope_compile.pipeline import Pipeline
from slope_compile.recipe import Recipe
from slope_compile.summary import summarize
from slope_compile.train.validation import FILE, HEADER, MODELS, Classified, load_record
from slope_compile.verify.metric.bootstrap import drop_interval
from slope_compile.verify.run import verify_run
from slope_compile.verify.verdict import Check, Verdict

sys.path.append(str(Path(__file__).parents[2] / "train"))
from train_files import NET, recipe_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A tiny run, trained and exported; tests copy it."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "net.py").write_text(NET)
    recipe = recipe_of(
        folder / "net.py",
        data={"source": "fake:300", "augment": "none"},
        train={"pretrain_epochs": 5, "epochs": 2, "lr": 0.1},
        export={"samples": 2},
        verify={"metric_drop": 0.5},
    )
    (folder / "run").mkdir()
    Pipeline(recipe, RunFolder(folder / "run"), Events()).run(["train", "export"])
    return recipe, folder / "run"


@pytest.fixture
def run(trained: tuple[Recipe, Path], tmp_path: Path) -> RunFolder:
    shutil.copytree(trained[1], tmp_path / "run")
    return RunFolder.existing(tmp_path / "run")


@pytest.fixture
def judge(trained: tuple[Recipe, Path], run: RunFolder) -> Callable[[], Verdict]:
    return lambda: verify_run(trained[0], run, "a100", run.fresh_partial("verify/a100"), Events())


def metric(verdict: Verdict) -> Check:
    assert verdict["pattern"].status == verdict["parity.onnx"].status == "pass"
    return verdict["metric"]


def test_the_verdict_has_the_interval_of_the_recorded_answers(
    run: RunFolder, judge: Callable[[], Verdict], trained: tuple[Recipe, Path]
) -> None:
    assert f"train/{FILE}" in run.records["train"].outputs
    check, record = metric(judge()), load_record(run.stage_path("train") / FILE)
    assert check.status == "pass" and check.figures["resamples"] == 10_000
    fp32, compressed = (record[model] for model in MODELS)
    assert isinstance(fp32, Classified) and isinstance(compressed, Classified)
    assert 0.5 < compressed.right.mean() < 1
    # The ONNX file answers what the trained model did.
    expected = drop_interval(fp32.right, compressed.right)
    assert expected is not None
    assert check.figures["interval"] == [pytest.approx(expected.low, abs=1e-6), pytest.approx(expected.high, abs=1e-6)]
    assert check.figures["onnx"] == pytest.approx(compressed.right.mean(), abs=1e-6)
    low, high = check.figures["accuracy_interval"]
    assert low < check.figures["onnx"] < high
    assert "95 % interval of the drop from FP32" in check.detail
    first = (run.partial_path("verify/a100") / "verify.json").read_bytes()
    judge()
    assert (run.partial_path("verify/a100") / "verify.json").read_bytes() == first
    run.commit("verify/a100", {}, {})
    told = summarize(run)["intervals"]
    figures = check.figures
    assert told == {
        "accuracy": {
            "onnx": figures["accuracy_interval"], "drop": figures["interval"], "certain": figures["certain"],
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), f"{FILE} does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is no record of validation"),
    ],
    ids=["missing", "cut off"],
)
def test_a_record_that_the_manifest_lists_must_be_readable(
    run: RunFolder, judge: Callable[[], Verdict], damage: Callable[[Path], Any], reason: str
) -> None:
    path = run.stage_path("train") / FILE
    damage(path)
    if path.is_file():  # signed again, so that nothing but the metric can tell
        run.records["train"].outputs[f"train/{FILE}"] = FileDigest.of(path)
    verdict = judge()
    assert verdict["digest"].status == ("pass" if path.is_file() else "fail")
    assert metric(verdict).status == "fail" and reason in metric(verdict).detail


def test_an_edited_record_fails(run: RunFolder, judge: Callable[[], Verdict]) -> None:
    edit(run.stage_path("train") / FILE, "fp32.predictions", lambda answers: answers * 0)
    check = metric(judge())
    assert check.status == "fail" and "by its recorded answers" in check.detail


def test_a_record_of_other_labels_fails(run: RunFolder, judge: Callable[[], Verdict]) -> None:
    """The same accuracies on other labels, and the data that was trained on: one of the two was edited."""
    path = run.stage_path("train") / FILE
    tensors = load_file(path)
    for name in ("truth.labels", "fp32.predictions", "compressed.predictions"):
        tensors[name] = np.roll(tensors[name], 1)
    save_file(tensors, path, metadata=HEADER)
    check = metric(judge())
    assert check.status == "fail" and "contradict the validation split" in check.detail
    assert "labels of" in check.detail


def test_a_run_of_before_there_were_records_is_judged_by_its_figures(
    run: RunFolder, judge: Callable[[], Verdict]
) -> None:
    manifest = json.loads((run.path / "manifest.json").read_text())
    del manifest["stages"]["train"]["outputs"][f"train/{FILE}"]
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    (run.stage_path("train") / FILE).unlink()
    run.records = RunFolder.existing(run.path).records
    verdict = judge()
    assert verdict["digest"].status == metric(verdict).status == "pass"
    figures = metric(verdict).figures
    assert figures["interval"] is None and figures["certain"] is None and figures["accuracy_interval"] is not None
    assert figures["interval_reason"] == f"training kept no answers to single images (no {FILE})"


def edit(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    tensors = load_file(path)
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, path, metadata=HEADER)
