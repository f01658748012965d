from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from engine_files import write_layers
from onnx import numpy_helper
from prepared_runs import write_list
from safetensors.numpy import save_file
from verify_twins import CHANNELS, SIDE, Twin, TwinModel, initializer, make_twin

import slope_compile as sc
from slope_compile.artifacts import RunFolder
from slope_compile.codes_file import save_codes
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.recipe import Recipe, recipe_from
from slope_compile.verify.run import verify, verify_run
from slope_compile.verify.verdict import Verdict

RECIPE: Recipe = recipe_from(
    {"model": {"name": "torchvision/resnet18"}, "data": {"source": "digits", "batch": 7}}, "test"
)

READS_GOLDEN = ("parity.onnx", "parity.onnx-default", "parity.placed", "agreement")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run folder of the twin, trained, exported and built (an 'engine' of four bytes)."""
    twin, folder = make_twin(), RunFolder(tmp_path / "run")
    train, export, build = (folder.fresh_partial(stage) for stage in ("train", "export", "build/a100"))
    save_codes(train / "codes.safetensors", twin.codes)
    save_file({"fc.bias": twin.bias}, train / "checkpoint.safetensors")
    (train / "metrics.json").write_text(
        json.dumps({"metric": "accuracy", "fp32": {"accuracy": 1.0}, "compressed": {"accuracy": 1.0}})
    )
    twin.write(export / "model.onnx")
    twin.golden(export / "golden.safetensors")
    write_list(export / "layers.json", export / "model.onnx", twin.codes)
    (build / "model.engine").write_bytes(b"plan")
    twin.write(build / "placed.onnx")
    write_layers(build, export / "model.onnx")
    for stage in ("train", "export", "build/a100"):
        folder.commit(stage, {}, {})
    images = torch.randn(20, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = twin.model()(images).argmax(1).tolist()
    stand_in(monkeypatch, twin, list(zip(images, labels, strict=True)))
    monkeypatch.setattr("slope_compile.verify.parity.engine.find_gpu", lambda: None)
    return folder


def stand_in(monkeypatch: pytest.MonkeyPatch, twin: Twin, validation: list[tuple[torch.Tensor, int]]) -> None:
    """Put small modules in place of the training's: those import torchvision and timm, for many seconds."""

    def in_order(items: int, batch: int) -> list[list[int]]:
        return [list(range(start, min(start + batch, items))) for start in range(0, items, batch)]

    def batches(dataset: Any, order: list[list[int]], workers: int, pin: bool) -> Iterator[Any]:
        for indices in order:
            yield torch.stack([dataset[i][0] for i in indices]), torch.tensor([dataset[i][1] for i in indices])

    contents: dict[str, dict[str, Any]] = {
        "trained": {"load_trained": lambda recipe, folder: twin.model()},
        "data": {
            "load_data": lambda section, seed, classes: SimpleNamespace(validation=validation, kind="classification")
        },
        "loader": {"in_order": in_order, "batches": batches},
    }
    for name, functions in contents.items():
        module = ModuleType(f"slope_compile.train.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def judge(folder: RunFolder, target: str = "a100") -> Verdict:
    out = folder.fresh_partial(f"verify/{target}")
    verdict = verify_run(RECIPE, folder, target, out, Events())
    assert json.loads((out / "verify.json").read_text()) == verdict.to_json()
    assert (out / "junit.xml").is_file()
    return verdict


def test_a_whole_run_passes_every_check_but_the_engines(run: RunFolder) -> None:
    verdict = judge(run)
    assert verdict.verdict == "pass"
    assert {check.name: check.status for check in verdict.checks if check.status != "pass"} == dict.fromkeys(
        ("packed", "parity.folded", "parity.engine", "engine.layers"), "not checked"
    )
    assert verdict["digest"].figures["files"] == 9
    assert verdict["metric"].figures["items"] == 20
    assert verdict["metric"].figures["onnx"] == 1.0


def test_an_edited_file_fails_digest_and_is_examined_all_the_same(run: RunFolder) -> None:
    path = run.stage_path("export") / "model.onnx"
    model = onnx.load(path)
    scale = initializer(model, "conv1.weight.scale")
    values = numpy_helper.to_array(scale).copy()
    values[3] *= -1
    scale.CopyFrom(numpy_helper.from_array(values, scale.name))
    onnx.save(model, path)
    verdict = judge(run)
    failed = [check.name for check in verdict.checks if check.status == "fail"]
    assert failed[:4] == ["digest", "pattern", "codes", "parity.onnx"]
    assert "export/model.onnx" in verdict["digest"].detail
    assert "conv1.weight" in verdict["pattern"].detail


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("train/codes.safetensors", {"digest", "codes"}),
        ("train/metrics.json", {"digest", "metric"}),
        ("export/golden.safetensors", {"digest", *READS_GOLDEN}),
        ("export/layers.json", {"digest", "codes", "engine.layers"}),
        ("build/a100/layers.json", {"digest", "parity.engine", "engine.layers"}),
        ("build/a100/placed.onnx", {"digest", "pattern", "parity.placed", "engine.layers"}),
        ("train/checkpoint.safetensors", {"digest", "pattern"}),
    ],
)
def test_each_truncated_file_fails_the_checks_that_read_it(run: RunFolder, name: str, failing: set[str]) -> None:
    path = run.path / name
    path.write_bytes(path.read_bytes()[:-5])
    verdict = judge(run)
    assert {check.name for check in verdict.checks if check.status == "fail"} == failing


def test_an_edited_engine_is_not_loaded(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slope_compile.verify.parity.engine.find_gpu", lambda: SimpleNamespace(sm=(8, 0)))
    monkeypatch.setattr("slope_compile.verify.parity.engine._run_engine", lambda *_: pytest.fail("it was run"))
    (run.path / "build/a100/model.engine").write_bytes(b"evil")
    verdict = judge(run)
    assert verdict["digest"].status == "fail"
    assert verdict["parity.engine"].status == "fail"
    assert "refused, not loaded" in verdict["parity.engine"].detail


def test_a_target_without_an_engine_is_verified_without_it(run: RunFolder) -> None:
    verdict = judge(run, "orin")
    assert verdict.verdict == "pass"
    assert verdict["parity.engine"].status == "not checked"


def test_a_run_without_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished 'train'"):
        verify_run(RECIPE, RunFolder(tmp_path), "a100", tmp_path, Events())


def test_where_torch_is_missing_golden_outputs_stand_in(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    verdict = judge(run)
    assert verdict.verdict == "pass"
    assert verdict["parity.onnx"].status == "pass" and "torch is not installed" in verdict["parity.onnx"].detail
    assert verdict["codes"].figures["trained_weights_compared"] is False
    assert verdict["metric"].status == "not checked"


@pytest.fixture
def compressed() -> tuple[TwinModel, Twin]:
    torch.manual_seed(0)
    model = TwinModel().eval()
    sc.compress(model, bits=4, pattern="2:4", first_last_bits=8)
    codes = {
        name: replace(coded, codes=coded.codes.numpy(), scale=coded.scale.numpy())
        for name, coded in sc.codes(model).items()
    }
    return model, Twin(codes, model.fc.bias.detach().numpy(), container="INT8")


def test_verify_from_python_takes_a_compressed_model(
    compressed: tuple[TwinModel, Twin], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, twin = compressed
    verdict = verify(str(twin.write(tmp_path / "m.onnx")), model=model)
    assert {
        name: verdict[name].status for name in ("pattern", "codes", "parity.onnx", "parity.onnx-default")
    } == dict.fromkeys(("pattern", "codes", "parity.onnx", "parity.onnx-default"), "pass")
    assert verdict["codes"].figures["trained_weights_compared"] is True
    assert verdict.verdict == "pass"
    assert capfd.readouterr() == ("", "")


def test_verify_from_python_finds_the_golden_file_beside(compressed: tuple[TwinModel, Twin], tmp_path: Path) -> None:
    model, twin = compressed
    path = twin.write(tmp_path / "m.onnx")
    twin.golden(tmp_path / "m.golden.safetensors", samples=3)
    assert verify(path, model=model)["parity.onnx"].figures["samples"] == 3
    with torch.no_grad():
        model.fc.bias += 0.5
    stale = verify(path, model=model)
    assert stale["parity.onnx"].status == "fail"
    assert "golden" in stale["parity.onnx"].detail


def test_verify_from_python_sees_that_the_model_was_trained_on(
    compressed: tuple[TwinModel, Twin], tmp_path: Path
) -> None:
    model, twin = compressed
    path = twin.write(tmp_path / "m.onnx")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    verdict = verify(path, model=model)
    assert verdict.verdict == "fail"
    assert verdict["codes"].status == "fail"


def test_the_room_is_callable() -> None:
    assert callable(sc.verify)
