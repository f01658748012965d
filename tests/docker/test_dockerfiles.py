"""The images cannot be built here (no Docker daemon): they are linted, and what they copy and promise is compared."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def dockerfile(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def instructions(path: Path) -> list[str]:
    """One string an instruction: comments dropped, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [line for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines() if line]


def test_there_are_both() -> None:
    assert [path.name for path in DOCKERFILES] == ["a100.Dockerfile", "jetson.Dockerfile"]


def test_hadolint(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_base_image_is_pinned(dockerfile: Path) -> None:
    (base,) = [line.split()[1] for line in instructions(dockerfile) if line.startswith("FROM ")]
    name, _, tag = base.rpartition(":")
    assert name.startswith("nvcr.io/nvidia/")
    assert re.search(r"\d+\.\d+", tag)


def test_it_runs_our_command_and_not_as_root(dockerfile: Path) -> None:
    lines = instructions(dockerfile)
    assert 'ENTRYPOINT ["slope-compile"]' in lines
    assert any(line.startswith("HEALTHCHECK ") and line.endswith('CMD ["slope-compile", "doctor"]') for line in lines)
    (user,) = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user == "10001"
    assert any(f"--uid {user}" in line for line in lines if line.startswith("RUN "))


def test_what_it_copies_is_there_and_reaches_the_builder(dockerfile: Path) -> None:
    allowed = {line[1:] for line in Path(f"{dockerfile}.dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for line in instructions(dockerfile) if line.startswith("COPY ") for source in line.split()[1:-1]}
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)
    assert {"slope_compile", "cli", "pyproject.toml"} <= copied


def test_only_the_server_image_may_bring_torch() -> None:
    server, jetson = ("\n".join(instructions(path)) for path in DOCKERFILES)
    assert "ARG EXTRAS=tensorrt" in server
    assert "[" not in jetson.partition("pip install")[2].partition("&&")[0]  # no extra: TensorRT is in the base image
    assert "train" not in jetson


def test_readme_says_what_is_not_checked() -> None:
    text = (ROOT / "docker" / "README.md").read_text()
    assert "not checked" in text
    for path in DOCKERFILES:
        base = instructions(path)[0].split()[1]
        assert base in text
        assert f"-f docker/{path.name}" in text
    for command in ("build digits-resnet18 --target a100", "verify digits-resnet18 --target orin"):
        assert command in text
