"""`--require`, `--bench` and `bench` through the command line, on a finished run: nothing is built again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slope_compile.targets.gpu import find_gpu

pytestmark = pytest.mark.e2e
ENGINE = "runs/tiny/build/a100/model.engine"


def build(cli: Any, folder: Path, *more: str) -> Any:
    return cli("build", "runs/tiny", *more, cwd=folder)


def test_met(cli: Any, copy: Path) -> None:
    done = build(cli, copy, "--require", "held>=1", "--require", "float<=6")
    assert done.returncode == 0, done.stderr
    assert "build/a100: skipped, unchanged" in done.stderr
    assert "layers eligible for sparse kernels (own count" in done.stdout
    assert "chosen not checked: TensorRT-RTX chooses kernels at run time" in done.stdout
    assert "require held>=1: met" in done.stdout


def test_not_met(cli: Any, copy: Path) -> None:
    """The gate fails and the engine stays; what nobody could check meets nothing."""
    before = (copy / ENGINE).read_bytes()
    done = build(cli, copy, "--require", "int4>=99", "--require", "sparse>=0")
    assert done.returncode == 1
    assert "build/a100 is built and does not hold what is required: int4>=99:" in done.stderr
    assert "not among them: " in done.stderr
    assert "sparse>=0: layers with a sparse kernel are not checked: TensorRT-RTX chooses" in done.stderr
    assert (copy / ENGINE).read_bytes() == before


def test_json(cli: Any, copy: Path) -> None:
    done = build(cli, copy, "--require", "held>=1", "--require", "sparse>=1", "--bench", "--json")
    assert done.returncode == 1
    told = json.loads(done.stdout)  # one object, also where the gate fails
    assert [(r["expression"], r["figure"], r["met"]) for r in told["requirements"]] == [
        ("held>=1", told["builds"]["build/a100"]["summary"]["held"], True),
        ("sparse>=1", "not checked", False),
    ]
    if find_gpu() is None:
        assert told["bench"]["build/a100"]["status"] == "not checked"


@pytest.mark.parametrize(
    ("text", "said"), [("sparce>=1", "Did you mean 'sparse'?"), ("sparse=1", "not of the form NAME OPERATOR NUMBER")]
)
def test_no_requirement(cli: Any, copy: Path, text: str, said: str) -> None:
    done = build(cli, copy, "--require", text)
    assert (done.returncode, said in done.stderr) == (2, True)


def test_a_requirement_of_the_recipe(cli: Any, copy: Path) -> None:
    done = cli("run", "tiny.yaml", "--set", "build.require=['held>=1', 'held>=99']", "--json", cwd=copy)
    assert done.returncode == 1, done.stderr
    assert "build/a100: skipped, unchanged" in done.stderr  # another requirement asks for no other engine
    told = json.loads(done.stdout)
    assert told["verdict"] == "pass"
    assert [row["met"] for row in told["requirements"]] == [True, False]
    assert "held>=99: NOT met" in done.stderr
    assert cli("run", "tiny.yaml", "--set", "build.require=[oops]", cwd=copy).returncode == 2


@pytest.mark.skipif(find_gpu() is not None, reason="there is a GPU: the numbers are another test's")
def test_bench_without_a_gpu(cli: Any, finished: Path, tmp_path: Path) -> None:
    done = cli("bench", ENGINE, cwd=finished)
    assert done.returncode == 0, done.stderr
    assert (
        "speed not checked: the engine was built for SM 8.0 (a100), and this machine has no NVIDIA GPU" in done.stdout
    )
    told = json.loads(cli("bench", ENGINE, "--json", cwd=finished).stdout)
    assert (told["status"], told["batch"], "engine" in told) == ("not checked", 4, False)
    missing = cli("bench", "none.engine", cwd=finished)
    assert (missing.returncode, "none.engine does not exist" in missing.stderr) == (2, True)


def test_bench_refuses_an_edited_engine(cli: Any, copy: Path) -> None:
    (copy / ENGINE).write_bytes(b"code of somebody else")
    done = cli("bench", ENGINE, cwd=copy)
    assert done.returncode == 2
    assert "is not the engine that layers.json describes: it is not loaded" in done.stderr


def test_inspect_tells_what_the_engine_holds(cli: Any, finished: Path) -> None:
    done = cli("inspect", "runs/tiny", cwd=finished)
    assert "engine for a100" in done.stdout
    assert "INT4 fused in " in done.stdout
    told = json.loads(cli("inspect", "runs/tiny", "--json", cwd=finished).stdout)
    assert "float left in" in told["engines"]["a100"]
    assert all(row["placed"]["a100"]["reason"] for row in told["layers"])
