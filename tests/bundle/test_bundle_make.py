from __future__ import annotations

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from bundle_files import codes_of, recipe

import slope_compile.bundle.make as make_module
from slope_compile.artifacts import RunFolder
from slope_compile.bundle.archive import opened_bundle, prove
from slope_compile.bundle.contents import INDEX
from slope_compile.bundle.make import bundle_run
from slope_compile.bundle.verify import bundle_tolerance
from slope_compile.codes_file import load_codes
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.events import Events
from slope_compile.recipe import BatchRange, load_recipe
from slope_compile.verify.parity.outputs import require_telling
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import NotCheckedError


def test_the_archive_lies_beside_the_run_and_holds_what_a_device_needs(run: RunFolder, archive: Path) -> None:
    assert archive == run.path.with_name("small.a100.bundle.zip")
    contents = prove(archive)
    assert set(contents.files) == {
        "model.onnx", "placed.onnx", "codes.safetensors", "golden.safetensors", "layers.json", "placement.json",
        "recipe.yaml",
    }  # fmt: skip
    assert (contents.name, contents.target, contents.backend) == ("small", "a100", "tensorrt-rtx")
    assert contents.build.batch == BatchRange(min=1, opt=2, max=4)
    assert contents.precision == "fp32"
    assert contents.allowed is not None
    assert 0 < contents.allowed.relative < 0.1
    assert contents.accuracies == {"fp32": 0.9, "compressed": 0.8}
    assert contents.accepts(contents.planned_for)
    assert not contents.accepts("99.0")


def test_its_files_are_the_runs(run: RunFolder, archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        assert opened.read("model.onnx") == (run.path / "export/model.onnx").read_bytes()
        opened.extractall(tmp_path)
    assert load_codes(tmp_path / "codes.safetensors").keys() == codes_of(run.path / "export/model.onnx").keys()
    assert load_recipe(tmp_path / "recipe.yaml") == recipe()
    places = json.loads((tmp_path / "placement.json").read_text())["places"]
    assert [place["placement"] for place in places][-1] == "float"


def test_the_same_run_gives_the_same_bytes(run: RunFolder, archive: Path, tmp_path: Path) -> None:
    again, _ = bundle_run(run, recipe(), "a100", Events(), tmp_path / "again" / "x.zip")
    assert again.read_bytes() == archive.read_bytes()


def test_auto_means_tensorrt_from_the_first_version_that_runs_there(run: RunFolder, tmp_path: Path) -> None:
    path, contents = bundle_run(run, recipe(backend="auto"), "orin", Events(), tmp_path / "o.zip")
    assert prove(path) == contents
    assert (contents.backend, contents.planned_for) == ("tensorrt", "10.3")
    assert contents.accepts("10.3.0.26")
    assert contents.accepts("11.4.1")
    assert not contents.accepts("11.0")  # on JetPack only from 11.4.1
    assert contents.build.targets == ["orin"]
    assert contents.build.batch == BatchRange(min=1, opt=2, max=4)


def test_a_version_may_be_named(run: RunFolder, tmp_path: Path) -> None:
    _, contents = bundle_run(run, recipe(backend="auto"), "orin", Events(), tmp_path / "o.zip", "10.16.1")
    assert contents.planned_for == "10.16.1"
    assert not contents.accepts("10.3")
    assert not contents.accepts("10.16.0")
    assert contents.accepts("10.16.2")
    assert "JetPack 7.2" in contents.version_range


@pytest.mark.parametrize(
    ("target", "build", "version", "told"),
    [
        ("oran", {}, None, "no target 'oran'"),
        ("orin", {}, None, "has no code generator for SM 8.7"),
        ("orin", {"backend": "auto"}, "11.0", "TensorRT 11.0 does not run on orin"),
        ("orin", {"backend": "auto"}, "ten", "'ten' is no version"),
        ("a100", {"dla": 0}, None, "has no DLA"),
        ("a100", {"placement": {"nothing": "float"}}, None, "fits no layer"),
    ],
)
def test_what_no_device_could_build_is_refused(
    run: RunFolder, tmp_path: Path, target: str, build: Any, version: Any, told: str
) -> None:
    with pytest.raises(BackendError, match=told):
        bundle_run(run, recipe(**build), target, Events(), tmp_path / "x.zip", version)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_edited_is_refused(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    (tmp_path / "copy/export/golden.safetensors").write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"golden\.safetensors"):
        bundle_run(RunFolder(tmp_path / "copy"), recipe(), "a100", Events())
    assert not list(tmp_path.glob("*.zip"))


def test_a_run_that_is_not_exported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished 'train'"):
        bundle_run(RunFolder(tmp_path / "none"), recipe(), "a100", Events())


def test_a_folder_is_not_overwritten(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is a folder"):
        bundle_run(run, recipe(), "a100", Events(), tmp_path)


def test_a_timing_cache_of_this_machine_does_not_travel(run: RunFolder, tmp_path: Path) -> None:
    build = {"backend": "auto", "timing_cache": "/home/me/timing.cache"}
    path, _ = bundle_run(run, recipe(**build), "a100", Events(), tmp_path / "x.zip")
    with opened_bundle(path) as opened, zipfile.ZipFile(path) as plain:
        assert opened.contents.build.timing_cache is None
        assert b"/home/me" not in plain.read("recipe.yaml") + plain.read(INDEX)


def test_without_onnxruntime_the_tolerance_of_quantized_activations_cannot_be_made(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: object) -> Tolerance:
        raise NotCheckedError("onnxruntime is not installed")

    monkeypatch.setattr(make_module, "of_engine", absent)
    with pytest.raises(BackendError, match="pip install onnxruntime"):
        bundle_run(run, recipe(), "a100", Events(), tmp_path / "x.zip")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("relative", [math.inf, math.nan])
def test_where_rounding_moves_outputs_anywhere_nothing_is_allowed_and_nothing_told(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: float
) -> None:
    monkeypatch.setattr(make_module, "of_engine", lambda *_: Tolerance(relative, "measured"))
    path, contents = bundle_run(run, recipe(), "a100", Events(), tmp_path / "x.zip")
    assert contents.allowed is None
    assert prove(path) == contents
    for none in (bundle_tolerance(contents), Tolerance(relative, "measured")):
        with pytest.raises(NotCheckedError, match="nothing can be told"):
            require_telling(none)


def test_a_figure_that_json_cannot_hold_is_named(run: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(run.path, tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy")
    shutil.copytree(folder.stage_path("train"), folder.partial_path("train"))
    figures = {"metric": "accuracy", "fp32": {"accuracy": math.nan}, "compressed": None}
    (folder.partial_path("train") / "metrics.json").write_text(json.dumps(figures))
    folder.commit("train", {}, {})
    with pytest.raises(ArtifactError, match=r"accuracies\.fp32 would be 'nan'"):
        bundle_run(folder, recipe(), "a100", Events(), tmp_path / "x.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
