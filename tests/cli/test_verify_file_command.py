"""`verify` of a lone ONNX file, of its engine, and of a bundle, through the command line in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from prepared_runs import ENGINE, flip_code, recipe_of
from safetensors.numpy import save_file
from verify_command import Run, in_process

from slope_compile.artifacts import RunFolder
from slope_compile.bundle.make import bundle_run
from slope_compile.events import Events


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return in_process(monkeypatch, capsys, tmp_path)


@pytest.fixture
def onnx(prepared: Path, tmp_path: Path) -> Path:
    """m.onnx with what export writes beside it, and m.a100.engine with what build does."""
    for name, copy in {
        "export/model.onnx": "m.onnx",
        "export/golden.safetensors": "m.golden.safetensors",
        "export/layers.json": "m.layers.json",
        ENGINE: "m.a100.engine",
        "build/a100/layers.json": "m.a100.engine.layers.json",
        "build/a100/placed.onnx": "m.a100.engine.placed.onnx",
    }.items():
        shutil.copy(prepared / name, tmp_path / copy)
    return tmp_path / "m.onnx"


def test_what_lies_beside_a_file_is_used_by_itself(verify: Run, onnx: Path) -> None:
    done = verify("m.onnx", "--json")
    assert done.code == 0, done.err
    status = done.status()
    assert status["pattern"] == "pass"  # bits and pattern are the layer list's
    assert status["parity.onnx"] == "pass"  # the outputs are the golden file's
    assert status["digest"] == status["codes"] == status["parity.engine"] == status["metric"] == "not checked"
    assert done.json["results"] == "m.verify"
    kept = json.loads(Path("m.verify/verify.json").read_text())
    assert kept["checks"] == done.json["checks"]
    assert Path("m.verify/junit.xml").is_file()


def test_without_anything_beside_it(verify: Run, onnx: Path) -> None:
    for name in ("m.golden.safetensors", "m.layers.json"):
        (onnx.parent / name).unlink()
    done = verify("m.onnx", "--json", "--out", "deep/results")
    assert done.status()["pattern"] == done.status()["parity.onnx"] == "not checked"
    assert Path("deep/results/verify.json").is_file()
    assert not Path("m.verify").exists()


def test_another_golden_file(verify: Run, onnx: Path) -> None:
    Path("m.golden.safetensors").rename("other.safetensors")
    assert verify("m.onnx", "--json", "--golden", "other.safetensors").status()["parity.onnx"] == "pass"
    missing = verify("m.onnx", "--golden", "none.safetensors")
    assert (missing.code, "none.safetensors does not exist" in missing.err) == (2, True)
    Path("other.safetensors").write_bytes(b"\0" * 40)
    damaged = verify("m.onnx", "--json", "--golden", "other.safetensors")
    assert (damaged.code, damaged.status()["parity.onnx"]) == (1, "fail")
    x = np.zeros((2, 3, 8, 8), np.float32)
    save_file({"inputs": x, "outputs": x[:, 0, 0]}, "other.safetensors")  # of another model
    other = verify("m.onnx", "--json", "--golden", "other.safetensors")
    assert (other.code, other.status()["parity.onnx"]) == (1, "fail")


def test_a_layer_list_that_declares_what_is_not_so_fails_pattern(verify: Run, onnx: Path) -> None:
    path = onnx.with_name("m.layers.json")
    rows = json.loads(path.read_text())["layers"]
    for row in rows:
        row["pattern"] = "1:4"
    path.write_text(json.dumps({"layers": [*rows, {**rows[0], "name": "absent.weight"}]}))
    done = verify("m.onnx", "--json")
    assert done.code == 1
    (pattern,) = [check for check in done.json["checks"] if check["name"] == "pattern"]
    assert pattern["figures"]["failing"] == ["absent.weight", "c.weight", "f.weight"]
    path.write_text("[")
    assert verify("m.onnx", "--json").status()["pattern"] == "not checked"


def test_a_wrong_file_fails_and_is_reported(verify: Run, onnx: Path) -> None:
    flip_code(onnx)
    done = verify("m.onnx", "--ci", "--json")
    assert (done.code, done.status()["parity.onnx"]) == (1, "fail")
    assert done.json["reports"][0] == "m.verify/junit.xml"
    sarif = json.loads(Path("m.verify/verify.sarif").read_text())
    uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in sarif["runs"][0]["results"]]
    assert set(uris) == {"m.onnx"}
    assert verify("m.onnx").code == 1
    assert not Path("m.verify/verify.sarif").exists()  # of the verification before
    onnx.write_bytes(b"no protobuf")
    assert verify("m.onnx").code == 1


def test_an_engine_is_loaded_only_if_it_is_trusted(verify: Run, onnx: Path) -> None:
    refused = verify("m.onnx", "--engine", "m.a100.engine")
    assert refused.code == 2
    assert (
        "is in no run's manifest, and an engine is code. If you built it yourself, say --trust-engine." in refused.err
    )
    assert not Path("m.verify").exists()
    done = verify("m.onnx", "--engine", "m.a100.engine", "--trust-engine", "--json")
    assert done.code == 0, done.err
    assert done.status()["engine.layers"] == done.status()["parity.placed"] == "pass"
    assert "no NVIDIA GPU" in next(c["detail"] for c in done.json["checks"] if c["name"] == "parity.engine")


def test_an_engine_of_a_run_is_trusted_by_its_manifest(verify: Run, onnx: Path, prepared: Path) -> None:
    shutil.copytree(prepared, "run")
    done = verify("m.onnx", "--engine", f"run/{ENGINE}", "--json")
    assert (done.code, done.status()["engine.layers"]) == (0, "pass")
    (Path("run") / ENGINE).write_bytes(b"another")
    assert verify("m.onnx", "--engine", f"run/{ENGINE}").code == 2


def test_an_engine_that_its_layer_list_does_not_describe(verify: Run, onnx: Path) -> None:
    Path("m.a100.engine").write_bytes(b"another")
    done = verify("m.onnx", "--engine", "m.a100.engine", "--trust-engine")
    assert (done.code, "is not the engine that m.a100.engine.layers.json describes" in done.err) == (2, True)
    Path("m.a100.engine.layers.json").unlink()
    done = verify("m.onnx", "--engine", "m.a100.engine", "--trust-engine")
    assert (done.code, "There is no m.a100.engine.layers.json" in done.err) == (2, True)


def test_a_folder_that_is_not_ours_is_left_alone(verify: Run, onnx: Path) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    done = verify("m.onnx", "--out", "mine")
    assert (done.code, "mine holds thesis.tex: it is no folder of a verification" in done.err) == (2, True)
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.tex"]
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    for where in (".", "m.onnx", "/"):
        assert verify("m.onnx", "--ci", "--out", where).code == 2


@pytest.mark.parametrize("kept", [None, "{}", '{"verdict": "pass", "checks": [{}], "required": []}', "["])
def test_names_alone_do_not_make_a_folder_ours(verify: Run, onnx: Path, kept: str | None) -> None:
    Path("mine/chain").mkdir(parents=True)
    Path("mine/chain/thesis.tex").touch()
    if kept is not None:
        Path("mine/verify.json").write_text(kept)
    for more in ([], ["--ci"]):
        done = verify("m.onnx", "--out", "mine", *more)
        assert (done.code, "no verify.json of ours: it is no folder of a verification" in done.err) == (2, True)
    assert Path("mine/chain/thesis.tex").is_file()
    assert Path("mine/verify.json").is_file() == (kept is not None)


def test_folders_beside_it_are_left_alone(verify: Run, onnx: Path) -> None:
    for name in (".m.verify.partial", ".m.verify.old"):
        Path(name).mkdir()
        Path(name, "thesis.tex").touch()
    for more in ([], [], ["--ci"], ["--ci"]):
        assert verify("m.onnx", *more).code == 0
    hidden = sorted(str(path) for path in Path().glob(".*"))
    assert hidden == [".m.verify.old", ".m.verify.partial"]
    assert all(Path(name, "thesis.tex").is_file() for name in hidden)


def test_what_stops_a_verification_takes_the_earlier_one_away_whole(verify: Run, onnx: Path) -> None:
    assert verify("m.onnx", "--ci").code == 0
    assert verify("m.onnx", "--ci", "--require", "metrik").code == 2
    assert not Path("m.verify").exists()
    assert verify("m.onnx", "--ci").code == 0


def test_a_link_to_a_folder_stays_one(verify: Run, onnx: Path) -> None:
    Path("real").mkdir()
    Path("link").symlink_to("real")
    for _ in range(2):
        assert verify("m.onnx", "--out", "link").code == 0
    assert Path("link").is_symlink() and Path("real/verify.json").is_file()


def test_a_place_that_cannot_be_written(verify: Run, onnx: Path) -> None:
    done = verify("m.onnx", "--out", "/proc/results")
    assert done.code == 2
    assert "/proc" in done.err and "Traceback" not in done.err


@pytest.fixture
def bundle(prepared: Path, tmp_path: Path) -> Path:
    """An archive with its folder beside it, built: as on a device."""
    shutil.copytree(prepared, tmp_path / "from")
    archive, _ = bundle_run(
        RunFolder(tmp_path / "from"),
        recipe_of(build={"targets": ["a100"], "backend": "tensorrt-rtx"}),
        "a100",
        Events(),
    )
    shutil.rmtree(tmp_path / "from")
    return archive.rename(tmp_path / "b.zip")


def test_a_bundle(verify: Run, bundle: Path) -> None:
    done = verify("b.zip", "--ci", "--json", "--require", "placement")
    assert done.code == 0, done.err
    assert done.json["required"][0]["met"]
    assert sorted(path.name for path in Path("b/ci").iterdir())[:2] == ["junit.xml", "summary.md"]
    done = verify("b.zip", "--ci", "--out", "reports", "--require", "metric", "--require", "parity.engine", "--json")
    assert done.code == 1
    assert [row["met"] for row in done.json["required"]] == [False, False]
    assert len(done.json["reports"]) == 4
    assert Path("reports/verify.sarif").is_file()
    for arguments in (("--require", "metrik"), ("--golden", "g"), ("--dry-run",), ("--out", "x"), ("--target", "orin")):
        assert verify("b.zip", *arguments).code == 2
