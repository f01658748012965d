"""The GitHub action and the GitLab template: they parse, say what docs/ci.md says, and their shell steps really run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prepared_runs import flip_code, make_run

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "ci/github/action.yml").read_text())
GITLAB = yaml.safe_load((ROOT / "ci/gitlab/slope-compile.gitlab-ci.yml").read_text())[".slope-compile-verify"]
DOC = (ROOT / "docs/ci.md").read_text()
FILES = sorted(path for path in (ROOT / "ci").rglob("*") if path.is_file())
# Starts the command line without torch, whose import takes many seconds; what it is asked for is written down.
SHIM = """#!{python}
import sys
from pathlib import Path
with Path({calls!r}).open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "verify":
    sys.modules["torch"] = None
    from slope_compile_cli.entry import main
    main()
"""
PYTHON = """#!/bin/sh
echo "python $*" >> {calls}
"""


@pytest.fixture
def place(net: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkout with a finished run, and a PATH whose slope-compile writes down what it is asked for."""
    make_run(tmp_path / "runs/r", net, engine=None)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"slope-compile": SHIM, "python": PYTHON}.items():
        (programs / name).write_text(text.format(python=sys.executable, calls=str(tmp_path / "calls")))
        (programs / name).chmod(0o755)
    return tmp_path


def shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a step as GitHub does (and GitLab, with `set -eo pipefail`)."""
    path = os.pathsep.join((str(folder / "bin"), os.environ["PATH"]))
    home = {name: value for name, value in os.environ.items() if name in ("HOME", "PYTHONPATH", "LANG")}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    environment = {**home, "PATH": path, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    return subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, check=False)


def step(name: str) -> Any:
    (found,) = [step for step in ACTION["runs"]["steps"] if step["name"] == name]
    return found


def variables(found: Mapping[str, Any], **given: str) -> dict[str, str]:
    """The step's environment as the inputs' defaults make it, and what is given."""
    told = {}
    for name, value in found["env"].items():
        key = re.fullmatch(r"\$\{\{ inputs\.([\w-]+) \}\}", value)
        told[name] = ACTION["inputs"][key[1]].get("default", "") if key else value
    return told | given


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_they_parse_and_pin_what_others_wrote(path: Path) -> None:
    text = path.read_text()
    assert yaml.safe_load(text)
    for action in re.findall(r"uses: (\S+)", text):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action) or action == "OWNER/slope-compile/ci/github@COMMIT"
    assert "${{" not in "".join(step.get("run", "") for step in ACTION["runs"]["steps"])  # no text becomes code
    assert str(path.relative_to(ROOT)) in DOC


def test_the_page_names_every_input_and_variable() -> None:
    for name in [*ACTION["inputs"], *ACTION["outputs"], *GITLAB["variables"]]:
        assert f"`{name}`" in DOC, name
    for name in re.findall(r"^#   (SLOPE_\w+)", (ROOT / "ci/gitlab/slope-compile.gitlab-ci.yml").read_text(), re.M):
        assert name in GITLAB["variables"]


def test_every_input_is_used() -> None:
    text = (ROOT / "ci/github/action.yml").read_text().partition("\nruns:")[2]
    for name in ACTION["inputs"]:
        assert f"inputs.{name}" in text, name


def test_the_examples_give_inputs_that_there_are() -> None:
    workflow = yaml.safe_load((ROOT / "ci/github/example.yml").read_text())
    (gate,) = [step for step in workflow["jobs"]["verify"]["steps"] if step.get("id") == "gate"]
    assert gate["with"].keys() <= ACTION["inputs"].keys()
    job = yaml.safe_load((ROOT / "ci/gitlab/example.gitlab-ci.yml").read_text())["verify"]
    assert job["variables"].keys() <= GITLAB["variables"].keys()


def test_github_installs_its_own_repository_or_what_it_is_told(place: Path) -> None:
    install = step("Install")
    done = shell(install["run"], place, **variables(install, ROOT="/action/ci/github/../.."))
    assert done.returncode == 0, done.stderr
    shell(install["run"], place, **variables(install, PACKAGE="slope-compile==1"))
    shell(install["run"], place, **variables(install, PACKAGE="none"))
    assert calls(place) == [
        "python -m pip install /action/ci/github/../..[train]", "doctor",
        "python -m pip install slope-compile==1", "doctor", "doctor",
    ]  # fmt: skip


def test_github_makes_the_run_first(place: Path) -> None:
    make = step("Train, export and build")
    done = shell(make["run"], place, **variables(make, RUN="runs/new", RECIPE="digits-resnet18", TARGET="a100\norin"))
    assert done.returncode == 0, done.stderr
    assert calls(place) == [
        "train --out runs/new -- digits-resnet18", "export -- runs/new",
        "build --target a100 --target orin -- runs/new",
    ]  # fmt: skip


@pytest.mark.e2e
def test_github_verifies_and_fails_as_the_verdict_does(place: Path) -> None:
    verify = step("Verify")
    environment = {
        "GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": str(place), "GITHUB_OUTPUT": str(place / "output"),
        "GITHUB_STEP_SUMMARY": str(place / "summary"),
    }  # fmt: skip
    done = shell(verify["run"], place, **variables(verify, RUN="runs/r", REQUIRE="digest\npattern"), **environment)
    assert done.returncode == 0, done.stderr
    assert calls(place) == ["verify --ci --out slope-compile-reports --require digest --require pattern -- runs/r"]
    assert (place / "output").read_text() == "verdict=pass\n"
    assert names(place / "slope-compile-reports") == [
        "junit.xml", "summary.md", "verify.json", "verify.sarif",
    ]  # fmt: skip

    flip_code(place / "runs/r/export/model.onnx")
    told = variables(verify, RUN="runs/r", REQUIRE="parity.*", BASELINE="runs/r", TRUST_ENGINE="true")
    done = shell(verify["run"], place, **told, **environment)
    assert done.returncode == 2  # a run is no baseline of its own
    assert calls(place)[1].endswith("--require parity.* --baseline runs/r --trust-engine -- runs/r")
    assert names(place / "slope-compile-reports") == []
    assert "::error title=slope-compile verify%3A could not verify::" in done.stderr

    done = shell(verify["run"], place, **variables(verify, RUN="runs/r"), **environment)
    assert done.returncode == 1
    assert "::error file=runs/r/manifest.json," in done.stderr
    assert (place / "output").read_text() == "verdict=pass\nverdict=error\nverdict=fail\n"
    assert (place / "summary").read_text().count("## slope-compile verify") == 2


@pytest.mark.e2e
def test_gitlab_verifies_and_leaves_its_reports(place: Path) -> None:
    script = "\n".join(GITLAB["script"])
    environment = {**GITLAB["variables"], "GITLAB_CI": "true", "CI_PROJECT_DIR": str(place)}
    shutil.copytree(place / "runs/r", place / "runs/release")
    told = {"SLOPE_RUN": "runs/r", "SLOPE_REQUIRE": "digest metric", "SLOPE_BASELINE": "runs/release"}
    done = shell(script, place, **{**environment, **told})
    assert done.returncode == 1, done.stderr
    paths = GITLAB["artifacts"]["reports"]
    issues = json.loads((place / paths["codequality"]).read_text())
    assert [issue["check_name"] for issue in issues] == ["slope-compile/metric"]
    assert (place / paths["junit"]).is_file()
    assert GITLAB["artifacts"]["when"] == "always"


@pytest.mark.e2e
def test_budgets_come_from_outside_and_a_run_is_no_option(place: Path) -> None:
    """Whoever made the run chose its name and wrote its recipe."""
    github, gitlab = step("Verify"), "\n".join(GITLAB["script"])
    environment = {"GITHUB_OUTPUT": str(place / "output")}
    settings = "verify.metric_drop=0.01 verify.require=[codes]"
    wanted = (
        "verify --ci --out slope-compile-reports --set verify.metric_drop=0.01 --set verify.require=[codes] -- runs/r"
    )
    done = shell(github["run"], place, **variables(github, RUN="runs/r", SET=settings), **environment)
    assert done.returncode == 0, done.stderr
    told = {**GITLAB["variables"], "SLOPE_RUN": "runs/r", "SLOPE_SET": settings}
    assert shell(gitlab, place, **told).returncode == 0
    assert calls(place) == [wanted, wanted]
    for name in ("--help", "--version"):
        assert shell(github["run"], place, **variables(github, RUN=name), **environment).returncode == 2
        assert shell(gitlab, place, **{**GITLAB["variables"], "SLOPE_RUN": name}).returncode == 2
    assert (place / "output").read_text() == "verdict=pass\nverdict=error\nverdict=error\n"


def test_the_verdict_is_error_where_an_earlier_step_failed() -> None:
    assert ACTION["outputs"]["verdict"]["value"] == "${{ steps.verify.outputs.verdict || 'error' }}"


def test_a_fork_has_no_alerts() -> None:
    workflow = yaml.safe_load((ROOT / "ci/github/example.yml").read_text())
    (alerts,) = [step for step in workflow["jobs"]["verify"]["steps"] if step.get("name") == "Alerts"]
    assert "github.event.pull_request.head.repo.full_name == github.repository" in alerts["if"]


def test_gitlab_installs_what_it_is_told(place: Path) -> None:
    script = "\n".join(GITLAB["before_script"])
    assert shell(script, place, **GITLAB["variables"]).returncode == 0
    assert shell(script, place, **{**GITLAB["variables"], "SLOPE_PACKAGE": ""}).returncode == 0
    assert calls(place) == ["python -m pip install slope-compile[train]", "doctor", "doctor"]


@pytest.mark.e2e
def test_the_plain_shell_of_the_page_runs(place: Path) -> None:
    (script,) = re.findall(r"```sh\n(.*?)```", DOC, re.DOTALL)
    shutil.move(place / "runs/r", place / "runs/release")
    done = shell(script.replace("--require metric", "--require codes"), place)
    assert done.returncode == 0, done.stderr
    assert (place / "slope-compile-reports/junit.xml").is_file()
