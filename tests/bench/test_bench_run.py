from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

import slope_compile.bench.run as run_module
from slope_compile.artifacts import RunFolder
from slope_compile.bench.measure import Plan
from slope_compile.bench.run import bench, dense_section
from slope_compile.bench.subject import find_subject
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.events import Events
from slope_compile.targets.gpu import Gpu, find_gpu
from slope_compile.targets.options import Options
from slope_compile.targets.target import TARGETS

GPU = find_gpu()
TARGET = next((target.name for target in TARGETS.values() if GPU and target.sm == GPU.sm), None)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine file with its layers.json; the engine is no engine, and nobody may load it."""
    path, onnx = tmp_path / "m.engine", tmp_path / "m.onnx"
    path.write_bytes(b"engine")
    onnx.write_bytes(b"onnx")
    header = {
        "backend": "tensorrt-rtx",
        "version": "1.7.1",
        "target": "a100",
        "sm": "8.0",
        "profile": {"x": {"min": [1, 3], "opt": [16, 3], "max": [64, 3]}},
        "onnx_sha256": hashlib.sha256(b"onnx").hexdigest(),
        "engine_sha256": hashlib.sha256(b"engine").hexdigest(),
        "engine_bytes": 6,
        "sparse_weights": True,
        "options": Options().as_dict(),
    }
    (tmp_path / "m.engine.layers.json").write_text(json.dumps({"header": header}))
    return path


def change(engine: Path, **header: Any) -> None:
    layers = engine.with_name("m.engine.layers.json")
    written = json.loads(layers.read_text())
    layers.write_text(json.dumps({"header": {**written["header"], **header}}))


def test_no_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "find_gpu", lambda: None)
    found = bench(engine)
    assert found["status"] == "not checked"
    assert found["reason"] == "the engine was built for SM 8.0 (a100), and this machine has no NVIDIA GPU"
    assert (found["shapes"], found["batch"]) == ({"x": [16, 3]}, 16)
    assert not {"engine", "dense", "faster"} & set(found)  # no numbers


def test_another_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "find_gpu", lambda: Gpu("H200", (9, 0)))
    import tensorrt_rtx

    change(engine, version=tensorrt_rtx.__version__)
    found = bench(engine)
    assert found["status"] == "not checked"
    assert "the GPU here is H200 (SM 9.0)" in found["reason"]


def test_measured(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the GPU: what the worker is asked, and what is told when the dense engine cannot be built."""
    asked: dict[str, Any] = {}
    answer = {"engine": {"latency_ms": {"p50": 1.0}, "cuda_graph": True, "no_cuda_graph": None}}
    monkeypatch.setattr(run_module, "find_gpu", lambda: Gpu("A100", (8, 0)))
    monkeypatch.setattr(run_module, "check_engine", lambda *_: None)
    monkeypatch.setattr(run_module, "_run", lambda request: asked.update(request) or answer)
    found = bench(engine, plan=Plan(rounds=2))
    assert asked["engines"] == {"engine": {"path": str(engine), "sha256": hashlib.sha256(b"engine").hexdigest()}}
    assert (asked["plan"]["rounds"], asked["batch"], asked["shapes"]) == (2, 16, {"x": [16, 3]})
    assert (found["status"], found["engine"], found["gpu"]["name"]) == ("measured", answer["engine"], "A100")
    assert found["dense"]["status"] == "not checked"
    assert "Name it with --onnx" in found["dense"]["reason"]
    assert bench(engine, engine.with_name("m.onnx"))["dense"]["reason"].startswith("no dense FP16 engine: ")


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [('{"not_checked": "no libcudart"}', 0, None), ('{"problem": "it broke.", "remedy": "r"}', 0, "it broke"),
     ("", -11, r"died \(exit code -11\): last words"), ("", 0, "died")],
)  # fmt: skip
def test_worker_answers(
    engine: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: int, error: str | None
) -> None:
    monkeypatch.setattr(run_module, "find_gpu", lambda: Gpu("A100", (8, 0)))
    monkeypatch.setattr(run_module, "check_engine", lambda *_: None)
    done = subprocess.CompletedProcess([], status, answer.encode(), b"last   words")
    monkeypatch.setattr("slope_compile.child.subprocess.run", lambda *_, **__: done)
    if error is None:
        assert bench(engine)["reason"] == "no libcudart"
    else:
        with pytest.raises(BackendError, match=error):
            bench(engine)


def test_an_edited_engine_is_not_loaded(engine: Path) -> None:
    engine.write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"not the engine that m\.engine\.layers\.json describes: it is not loaded"):
        bench(engine)


def test_an_engine_that_nobody_vouches_for(engine: Path) -> None:
    engine.with_name("m.engine.layers.json").unlink()
    with pytest.raises(ArtifactError, match="nobody vouches for it"):
        bench(engine)


def test_an_engine_in_a_folder_that_is_no_run(engine: Path) -> None:
    engine.with_name("m.engine.layers.json").rename(engine.with_name("layers.json"))
    with pytest.raises(ArtifactError, match=r"no m\.engine\.layers\.json beside the engine: nobody vouches"):
        bench(engine)


@pytest.fixture
def in_run(engine: Path, tmp_path: Path) -> Path:
    """The same engine in a run, which has the model too."""
    run = RunFolder(tmp_path / "run")
    with run.locked():
        export = run.fresh_partial("export")
        (export / "model.onnx").write_bytes(b"onnx")
        run.commit("export", {}, {})
        build = run.fresh_partial("build/a100")
        (build / "model.engine").write_bytes(engine.read_bytes())
        (build / "layers.json").write_bytes(engine.with_name("m.engine.layers.json").read_bytes())
        run.commit("build/a100", {}, {})
    return run.path / "build/a100/model.engine"


def test_an_engine_of_a_run(in_run: Path) -> None:
    subject = find_subject(in_run, None)
    assert (subject.engine, subject.onnx) == (in_run, in_run.parents[2] / "export/model.onnx")


def test_in_a_run_the_manifest_alone_vouches(in_run: Path, engine: Path) -> None:
    """An engine and the .layers.json that describes it, both put there by the same hand."""
    in_run.write_bytes(b"other")
    header = json.loads(engine.with_name("m.engine.layers.json").read_text())["header"]
    header["engine_sha256"] = hashlib.sha256(b"other").hexdigest()
    in_run.with_name("model.engine.layers.json").write_text(json.dumps({"header": header}))
    link = in_run.parents[3] / "link.engine"
    link.symlink_to(in_run)
    link.with_name("link.engine.layers.json").write_text(json.dumps({"header": header}))
    for path in (in_run, link):
        with pytest.raises(ArtifactError, match=r"is not the engine that layers\.json describes: it is not loaded"):
            find_subject(path, None)
    in_run.with_name("layers.json").write_text(json.dumps({"header": header}))
    with pytest.raises(ArtifactError, match="the manifest says"):
        find_subject(in_run, None)


def test_in_a_run_what_no_stage_made_is_not_loaded(in_run: Path) -> None:
    stray = in_run.with_name("stray.engine")
    stray.write_bytes(in_run.read_bytes())
    with pytest.raises(ArtifactError, match="is not in the manifest of"):
        find_subject(stray, None)
    folder = in_run.parents[1] / "h200"
    folder.mkdir()
    for name in ("model.engine", "layers.json"):
        (folder / name).write_bytes(in_run.with_name(name).read_bytes())
    with pytest.raises(ArtifactError, match="build/h200"):
        find_subject(folder / "model.engine", None)


def test_a_model_that_was_exported_again(in_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is measured alone; a model that is named must be the one."""
    model = in_run.parents[2] / "export/model.onnx"
    model.write_bytes(b"exported again")
    answer = {"engine": {"latency_ms": {"p50": 1.0}, "cuda_graph": True, "no_cuda_graph": None}}
    monkeypatch.setattr(run_module, "find_gpu", lambda: Gpu("A100", (8, 0)))
    monkeypatch.setattr(run_module, "check_engine", lambda *_: None)
    monkeypatch.setattr(run_module, "_run", lambda _: answer)
    found = bench(in_run)
    assert (found["status"], found["dense"]["status"]) == ("measured", "not checked")
    assert f"{model} is not the file that the engine was built from" in found["dense"]["reason"]
    with pytest.raises(ArtifactError, match="is not the file that the engine was built from"):
        bench(in_run, model)


def test_another_model(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match="is not the file that the engine was built from"):
        bench(engine, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match=r"none\.onnx does not exist"):
        bench(engine, tmp_path / "none.onnx")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"header": 3}', '{"header": {}}', "[" * 5000], ids=str)
def test_damaged_layers(engine: Path, text: str) -> None:
    engine.with_name("m.engine.layers.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"m\.engine\.layers\.json cannot be read"):
        find_subject(engine, None)


@pytest.mark.parametrize(
    "profile",
    [
        3, {"x": 3}, {"x": {}}, {"x": {"min": [1], "opt": ["a"], "max": [1]}},
        {"x": {"min": [0], "opt": [1], "max": [1]}}, {"x": {"min": [], "opt": [], "max": []}},
    ],
)  # fmt: skip
def test_damaged_profile(engine: Path, profile: Any) -> None:
    change(engine, profile=profile)
    with pytest.raises(ArtifactError, match="cannot be read"):
        find_subject(engine, None)


@pytest.mark.parametrize("name", ["missing.engine", "."])
def test_no_engine(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=r"does not exist|is a folder"):
        bench(tmp_path / name)


def test_a_fixed_batch(engine: Path) -> None:
    change(engine, profile={})
    subject = find_subject(engine, None)
    assert (subject.shapes, subject.batch) == ({}, 1)


def test_the_dense_engine_is_built_alike(engine: Path) -> None:
    options = {
        **Options().as_dict(),
        "optimization_level": 3,
        "workspace": 2**30,
        "refit": True,
        "version_compatible": True,
    }
    change(engine, options=options)
    section = dense_section(find_subject(engine, None).header)
    assert (section.precision, section.backend, section.batch.resolved(1)) == ("fp16", "tensorrt-rtx", (1, 16, 64))
    assert (section.optimization_level, section.workspace_gib) == (3, 1.0)
    assert not section.refit and not section.strip and not section.version_compatible  # it is for one process


def test_the_dense_engine_holds_fp16_and_no_sparse_kernels(net: Any, tmp_path: Path) -> None:
    """Built for real, ahead of time; only loading it would need the GPU."""
    from slope_compile.build.single import build

    model, out, folder = net(), tmp_path / "m.engine", tmp_path / "dense"
    folder.mkdir()
    build(model, "a100", out, backend="tensorrt-rtx", batch={"opt": 2, "max": 4})
    asked = run_module._dense(find_subject(out, model), folder, Events())
    assert asked["sha256"] == hashlib.sha256(Path(asked["path"]).read_bytes()).hexdigest()
    built = json.loads((folder / "layers.json").read_text())
    assert {row["engine"]["dtype"] for row in built["layers"]} == {"Half"}
    assert (
        built["header"]["profile"] == json.loads(out.with_name("m.engine.layers.json").read_text())["header"]["profile"]
    )
    assert "SPARSE_WEIGHTS" not in (folder / "build.log").read_text()


@pytest.mark.parametrize(
    "odd",
    [
        {"options": {**Options().as_dict(), "optimization_level": 99}},
        {"options": {**Options().as_dict(), "workspace": "all"}},
        {"profile": {"x": {"min": [9], "opt": [2], "max": [4]}}},
    ],
)
def test_settings_that_no_build_takes(engine: Path, odd: dict[str, Any]) -> None:
    change(engine, **odd)
    with pytest.raises(ArtifactError, match="names settings that no build takes"):
        dense_section(find_subject(engine, None).header)


@pytest.mark.gpu
@pytest.mark.skipif(TARGET is None, reason=f"needs an NVIDIA GPU that is one of our targets; here: {GPU or 'none'}")
def test_on_this_gpu(net: Any, tmp_path: Path) -> None:
    from slope_compile.build.single import build

    model, out = net("INT8"), tmp_path / "m.engine"
    build(model, TARGET or "", out)
    found = bench(out, model, plan=Plan(rounds=3, warm_up_s=0.1, round_s=0.1))
    assert found["status"] == "measured", found
    assert 0 < found["engine"]["latency_ms"]["p50"] <= found["engine"]["latency_ms"]["p99"]
    assert (
        found["faster"]["latency"]["low"] <= found["faster"]["latency"]["ratio"] <= found["faster"]["latency"]["high"]
    )
