"""From a run to an engine on a device, whose Python cannot import torch, onnxruntime or onnx_ir."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slope_compile.artifacts import RunFolder
from slope_compile.bundle.make import bundle_run
from slope_compile.events import Events
from slope_compile.recipe import load_recipe

pytestmark = pytest.mark.e2e
ABSENT = (
    "torch", "torchvision", "timm", "sklearn", "accelerate", "torchmetrics", "pycocotools", "onnxruntime", "onnx_ir",
    "onnxscript", "matplotlib", "scipy",
)  # fmt: skip
SITE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
ARCHIVE = "tiny.a100.bundle.zip"


@pytest.fixture(scope="module")
def archive(finished: Path, cli: Any) -> Path:
    done = cli("bundle", "runs/tiny", "--target", "a100", "--set", "build.backend=tensorrt-rtx", "--json", cwd=finished)
    assert done.returncode == 0, done.stderr
    (told,) = json.loads(done.stdout)["bundles"]
    assert told["target"] == "a100"
    assert told["bytes"] == (finished / "runs" / ARCHIVE).stat().st_size
    assert set(told["accuracies"]) == {"fp32", "compressed"}
    return finished / "runs" / ARCHIVE


@pytest.fixture(scope="module")
def device(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and a Python that lacks what a Jetson lacks."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copy(archive, folder)
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    return folder


RUN = f"""
import contextlib, io, json, sys
from slope_compile_cli.main import main

answers = []
for arguments in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["slope-compile", *arguments]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    answers.append([code, out.getvalue(), err.getvalue()])
assert not set(sys.modules) & set({ABSENT!r})
assert any(type(finder).__name__ == "Absent" for finder in sys.meta_path)
print(json.dumps(answers))
"""


def bare(folder: Path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Run commands there, one after the other; returns each one's exit code, stdout and stderr."""
    path = os.pathsep.join([str(folder / "site"), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(commands), cwd=folder, env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, out, err) for code, out, err in json.loads(done.stdout.splitlines()[-1])]


def test_built_and_verified_without_torch_or_onnxruntime(device: Path, finished: Path) -> None:
    (built, out, err), (verified, checked, why) = bare(
        device, ["build", ARCHIVE, "--json"], ["verify", ARCHIVE, "--json"]
    )
    assert built == 0, err
    told = json.loads(out)
    engine = device / "tiny.a100/build/a100/model.engine"
    assert engine.stat().st_size == told["header"]["engine_bytes"]
    assert told["summary"]["held"] == told["summary"]["coded"] == 6
    built_from = device / "tiny.a100/bundle/placed.onnx"
    assert built_from.read_bytes() == (finished / "runs/tiny/build/a100/placed.onnx").read_bytes()
    assert verified == 0, why
    checks = {check["name"]: check for check in json.loads(checked)["checks"]}
    for name in ("digest", "pattern", "codes", "placement", "engine.layers"):
        assert checks[name]["status"] == "pass"
    for name in ("parity.onnx", "parity.onnx-default", "parity.placed"):
        assert (checks[name]["status"], checks[name]["detail"]) == ("not checked", "onnxruntime is not installed")
    assert "no NVIDIA GPU" in checks["parity.engine"]["detail"]


def test_what_else_the_commands_do_with_a_bundle(device: Path) -> None:
    again, looked, unpacked = bare(
        device, ["build", ARCHIVE, "--target", "a100"], ["inspect", ARCHIVE], ["inspect", "tiny.a100", "--json"]
    )
    assert [code for code, _, _ in (again, looked, unpacked)] == [0, 0, 0]
    assert "build/a100: skipped, unchanged" in again[2]
    assert "placed.onnx" in looked[1]
    assert "every checksum holds" in looked[1]
    assert {"bundle", "build/a100", "verify/a100"} == json.loads(unpacked[1])["stages"].keys()


def test_refusals_say_why_and_leave_nothing_behind(device: Path, finished: Path, tmp_path: Path) -> None:
    cut, orin = tmp_path / "cut.zip", tmp_path / "orin.zip"
    cut.write_bytes((device / ARCHIVE).read_bytes()[:-30])
    run = finished / "runs/tiny"
    bundle_run(RunFolder(run), load_recipe(run / "recipe.yaml"), "orin", Events(), orin)
    refusals = {
        "is a bundle for a100, not for orin": ["build", ARCHIVE, "--target", "orin"],
        "--set goes with a run folder": ["build", ARCHIVE, "--set", "build.refit=true"],
        "--dry-run goes with a run folder": ["verify", ARCHIVE, "--dry-run"],
        "none.zip does not exist": ["build", "none.zip"],
        "tiny.a100 is where a bundle was unpacked": ["bundle", "tiny.a100"],
        "--out goes with the archive": ["build", "tiny.a100", "--out", str(tmp_path / "x")],
        "cut.zip is not a bundle": ["build", str(cut), "--json"],
        "there is none here; target orin": ["build", str(orin)],
        "needs onnx_ir, which is not installed": ["build", "tiny.a100/bundle/model.onnx", "--out", "x.engine"],
        "needs torch, which is not installed": ["train", "digits-resnet18", "--out", str(tmp_path / "run")],
    }
    before = sorted(path for path in device.rglob("*") if "__pycache__" not in str(path))
    for told, (code, out, err) in zip(refusals, bare(device, *refusals.values()), strict=True):
        assert code == 2, err
        assert told in " ".join(err.split())
        assert "Traceback" not in err
        if "cut" in told:
            assert "cut.zip" in json.loads(out)["error"]["problem"]
    assert sorted(path for path in device.rglob("*") if "__pycache__" not in str(path)) == before
    assert not (tmp_path / "cut").exists()
