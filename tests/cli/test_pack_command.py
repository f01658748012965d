"""`pack`, `unpack`, and what `verify` and `inspect` make of a packed file, through the command line in this process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared_runs import PATTERNS, make_run, recipe_of
from safetensors.numpy import load_file, save_file
from slope_compile_cli import pack
from verify_command import Run, in_process

from slope_compile.artifacts import FileDigest, RunFolder
from slope_compile.events import Events
from slope_compile.pack.read import open_packed
from slope_compile.pipeline import open_run

RUN, FILE = "run", "run/model.slope"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return in_process(monkeypatch, capsys, tmp_path, command=None)


@pytest.fixture(scope="session")
def unpacked(net: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint, trained and exported; nothing was built or packed."""
    folder = make_run(tmp_path_factory.mktemp("unpacked") / RUN, net, engine=None)
    write_checkpoint(folder)
    return folder.path


def write_checkpoint(folder: RunFolder, bias: float = 0.5) -> None:
    """Commit the train stage again with a checkpoint: the latents, and a tensor without codes."""
    partial = folder.fresh_partial("train")
    shutil.copytree(folder.stage_path("train"), partial, dirs_exist_ok=True)
    latents = {f"{name.removesuffix('.weight')}.parametrizations.weight": name for name in PATTERNS}
    tensors = {f"{latent}.original": np.ones((2, 2), np.float32) for latent in latents}
    tensors |= {f"{latent}.0.step": np.ones((), np.float32) for latent in latents}
    save_file({**tensors, "h.bias": np.full(3, bias, np.float32)}, partial / "checkpoint.safetensors")
    folder.commit("train", folder.records["train"].key, {})


@pytest.fixture
def made(unpacked: Path, tmp_path: Path) -> Path:
    """A copy of the run, in the folder that commands run in."""
    shutil.copytree(unpacked, tmp_path / RUN)
    return tmp_path / RUN


@pytest.fixture(scope="session")
def packed_once(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, packed."""
    path = shutil.copytree(unpacked, tmp_path_factory.mktemp("packed") / RUN)
    with open_run(path, recipe_of(), Events()) as pipeline:
        pipeline.run(["pack"])
    return path


@pytest.fixture
def packed(packed_once: Path, tmp_path: Path, run: Run) -> Path:
    """The packed file of a copy, in the folder that commands run in."""
    return Path(shutil.copytree(packed_once, tmp_path / RUN)) / "model.slope"


def detail(done: Any, name: str) -> str:
    return str(next(check["detail"] for check in done.json["checks"] if check["name"] == name))


def test_a_run_is_packed_once_and_again_when_its_training_changed(run: Run, made: Path) -> None:
    assert "pack: would run (not made yet)" in run("pack", RUN, "--dry-run").out
    assert not (made / "model.slope").exists()
    first = run("pack", RUN, "--json").json
    assert [o["action"] for o in first["outcomes"]] == ["done"]
    assert (first["content"], first["bytes"]) == ("model", (made / "model.slope").stat().st_size)
    assert RunFolder(made).records["pack"].outputs == {"model.slope": FileDigest.of(made / "model.slope")}
    assert not list(made.glob("*.partial"))
    again = run("pack", RUN, "--json").json
    assert [o["reason"] for o in again["outcomes"]] == ["unchanged"]
    assert again["sha256"] == first["sha256"]
    assert run("pack", RUN, "--force", "--json").json["outcomes"][0]["reason"] == "forced"
    write_checkpoint(RunFolder(made), bias=0.25)
    assert "changed: input train/checkpoint.safetensors" in run("pack", RUN, "--dry-run").out
    assert run("pack", RUN, "--json").json["sha256"] != first["sha256"]


def test_sizes_are_the_files_in_inspect_and_in_the_report(
    run: Run, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, sizes = run("inspect", RUN, "--json").json, open_packed(packed).sizes
    assert (told["sizes"]["packed"]["weights"], told["sizes"]["packed"]["model"]) == (sizes.weights, sizes.model)
    assert told["sizes"]["packed"]["model_ratio"] == round(1000 / sizes.model, 3)
    assert "Packed file" in packed.with_name("report.html").read_text()
    alone = run("inspect", FILE, "--json").json
    assert alone["sizes"]["model"] == alone["bytes"] == packed.stat().st_size
    assert sum(row["packed"] for row in alone["tensors"]) == sizes.weights + sizes.others
    assert {row["name"]: row["pattern"] for row in alone["tensors"]} == {
        "c.weight": "2:4", "f.weight": None, "h.bias": None,
    }  # fmt: skip
    assert "packed bits each" in run("inspect", FILE).out
    assert "packed bits each" not in run("inspect", FILE, "--json").err
    monkeypatch.setattr(pack, "MOST_ROWS", 1)
    assert "and 2 more tensors" in run("inspect", FILE).out
    assert len(run("inspect", FILE, "--json").json["tensors"]) == 3


def test_verify_proves_the_packed_file_of_a_run(run: Run, packed: Path) -> None:
    done = run("verify", RUN, "--require", "packed", "--json")
    assert (done.code, done.status()["packed"], done.status()["digest"]) == (0, "pass", "pass"), done.err
    assert "and 1 other tensors are the checkpoint's, bit for bit" in detail(done, "packed")


def test_a_run_without_a_packed_file_is_not_checked(run: Run, made: Path) -> None:
    done = run("verify", RUN, "--json")
    assert (done.code, done.status()["packed"]) == (0, "not checked")
    assert run("verify", RUN, "--require", "packed").code == 1
    (made / "model.slope").write_bytes(b"of somebody")
    stray = run("verify", RUN, "--json")
    assert (stray.code, detail(stray, "digest")) == (1, "model.slope is not in the manifest")


def test_an_edited_packed_file_fails_and_is_mended_by_force(run: Run, packed: Path) -> None:
    data = bytearray(packed.read_bytes())
    data[-9] ^= 1
    packed.write_bytes(data)
    done = run("verify", RUN, "--json")
    assert (done.code, done.status()["digest"], done.status()["packed"]) == (1, "fail", "fail")
    told = run("inspect", RUN, "--json")
    assert (told.code, told.json["sizes"]["packed"]) == (0, None)
    refused = run("pack", RUN)
    assert (refused.code, "truncated or edited after 'pack' finished" in refused.err) == (2, True)
    assert run("pack", RUN, "--force").code == 0
    assert run("verify", RUN, "--require", "packed").code == 0


def test_another_runs_packed_file_is_told_apart_though_the_manifest_is_rewritten(
    run: Run, packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(tmp_path / RUN, tmp_path / "other")
    write_checkpoint(RunFolder(tmp_path / "other"), bias=0.25)
    assert run("pack", "other").code == 0
    folder = RunFolder(tmp_path / RUN)
    shutil.copy(tmp_path / "other/model.slope", folder.fresh_partial("pack"))
    folder.commit("pack", folder.records["pack"].key, {})
    done = run("verify", RUN, "--json")
    assert (done.code, done.status()["digest"], done.status()["packed"]) == (1, "pass", "fail")
    assert "h.bias: values: 3 of 3 differ from the trained ones, the first at [0]" in detail(done, "packed")


def test_a_lone_packed_model(run: Run, packed: Path, tmp_path: Path) -> None:
    packed.rename("m.slope")
    done = run("verify", "m.slope", "--json", "--ci")
    assert (done.code, done.status()) == (0, {"codes": "not checked", "packed": "pass"}), done.err
    assert done.json["results"] == "m.verify"
    assert json.loads(Path("m.verify/verify.json").read_text())["verdict"] == "pass"
    assert run("unpack", "m.slope").code == 0
    assert load_file("m.unpacked/tensors.safetensors").keys() == {"h.bias"}
    assert Path("m.unpacked/codes.safetensors").read_bytes() == Path("run/train/codes.safetensors").read_bytes()
    again = run("unpack", "m.slope")
    assert (again.code, "codes.safetensors exists already" in again.err) == (2, True)
    whole = Path("m.slope").read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        Path("m.slope").write_bytes(damaged)
        assert run("verify", "m.slope", "--json").status()["packed"] == "fail"
        assert run("verify", "m.slope").code == 1
        assert run("unpack", "m.slope", "--out", "again").code == 2


def test_an_onnx_file_comes_back_bit_for_bit_and_is_verified(run: Run, made: Path) -> None:
    for name, copy in (("model.onnx", "m.onnx"), ("golden.safetensors", "m.golden.safetensors")):
        shutil.copy(made / "export" / name, copy)
    shutil.copy(made / "export/layers.json", "m.layers.json")
    told = run("pack", "m.onnx", "--json").json
    assert (told["packed"], told["content"]) == ("m.slope", "onnx")
    assert told["bytes"] == Path("m.slope").stat().st_size
    whole = Path("m.onnx").read_bytes()
    Path("m.onnx").unlink()
    done = run("verify", "m.slope", "--json")
    assert done.code == 0, done.err
    assert {done.status()[name] for name in ("packed", "pattern", "parity.onnx")} == {"pass"}
    assert Path("m.verify/chain/onnx.json").is_file()
    restored = run("unpack", "m.slope", "--out", "deep/er", "--json").json
    assert [file["path"] for file in restored["files"]] == ["deep/er/m.onnx"]
    assert Path("deep/er/m.onnx").read_bytes() == whole
    data = bytearray(Path("m.slope").read_bytes())
    data[-9] ^= 1
    Path("m.slope").write_bytes(data)
    damaged = run("verify", "m.slope", "--json")
    assert (damaged.code, damaged.status()) == (1, {"packed": "fail"})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pack", "nowhere"], "nowhere does not exist"),
        (["pack", "nowhere.onnx"], "nowhere.onnx"),
        (["pack", "empty"], "empty is not a run folder"),
        (["pack", FILE], "is packed already"),
        (["pack", "run/recipe.yaml"], "is neither a run folder nor an .onnx file"),
        (["pack", "run", "--out", "x.slope"], "a run keeps its model.slope"),
        (["pack", "run/export/model.onnx", "--force"], "go with a run folder"),
        (["pack", "run/export/model.onnx", "--out", "x.bin"], "Example: --out x.slope"),
        (["unpack", "run"], "Name its packed file: run/model.slope"),
        (["unpack", "nowhere.slope"], "nowhere.slope"),
        (["unpack", "run/export/model.onnx"], "run/export/model.onnx is no packed file"),
        (["unpack", FILE, "--out", "run/recipe.yaml"], "run/recipe.yaml exists and is no folder"),
        (["unpack", FILE, "--out", "loop"], "loop is a link that leads nowhere"),
        (["unpack", "fifo.slope"], "fifo.slope is not a file"),
        (["inspect", "fifo.slope"], "fifo.slope is not a file"),
        (["verify", "fifo.slope"], "fifo.slope is not a file"),
        (["export", FILE], "is a packed file, not a run folder. Name a run folder; `unpack`, `verify` and"),
        (["build", FILE], "is a packed file, not a run folder"),
        (["bundle", FILE], "is a packed file, not a run folder"),
        (["inspect", FILE, "--target", "a100"], "is no graph"),
        (["inspect", "nowhere.slope"], "nowhere.slope"),
        (["verify", "nowhere.slope"], "nowhere.slope does not exist"),
        (["verify", FILE, "--golden", "g"], "run/model.slope is a packed file; --golden goes with an .onnx file"),
        (["verify", FILE, "--baseline", "run"], "is a packed file; --baseline goes with a run folder"),
        (["verify", FILE, "--trust-engine"], "there is no engine"),
        (["verify", FILE, "--require", "paked"], "Did you mean 'packed'?"),
    ],
)
def test_what_is_no_question(run: Run, packed: Path, arguments: list[str], words: str) -> None:
    Path("empty").mkdir()
    Path("loop").symlink_to("loop")
    os.mkfifo("fifo.slope")
    before = {path: path.stat().st_mtime_ns for path in packed.parent.rglob("*")}
    done = run(*arguments)
    assert (done.code, words in " ".join(done.err.split())) == (2, True), done.err
    assert "Traceback" not in done.err
    after = {path: path.stat().st_mtime_ns for path in packed.parent.rglob("*")}
    assert after == before
