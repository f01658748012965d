"""The project's own promises: what the wheel installs, what the lock names, links and commands in the docs."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("d*/*.md"))]


def test_the_wheel_installs_two_packages_with_recipes_and_no_cli_or_tests(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = next(name for name in names if name.endswith("entry_points.txt"))
        assert "slope-compile = slope_compile_cli.entry:main" in wheel.read(metadata).decode()
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"slope_compile", "slope_compile_cli"}
    assert "slope_compile/recipes/digits-resnet18.yaml" in names
    assert "slope_compile/targets/target.py" in names
    assert "slope_compile/py.typed" in names


def test_the_lock_pins_every_package_with_hashes_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    pinned = [line for line in text.splitlines() if re.match(r"[a-z]", line)]
    assert len(pinned) > 50
    assert all(re.match(r"[a-z0-9._-]+==\S+( ;.*)? \\$", line) for line in pinned)
    assert text.count("--hash=sha256:") >= len(pinned)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_commands_of_the_readme_exist() -> None:
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", readme, re.M):
        assert re.search(rf"^{target}:", makefile, re.M)
    from slope_compile_cli.main import app

    known = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    used = set(re.findall(r"bin/slope-compile (\w+)", readme))
    assert used
    assert used <= known


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "    make test " in (ROOT / "README.md").read_text()


def test_every_dependency_earns_a_line() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    page = (ROOT / "docs/dependencies.md").read_text().lower()
    for name in re.findall(r'^  "([A-Za-z0-9._-]+)>=', listed, re.M) + re.findall(r'\["([a-z-]+)>=', listed):
        assert name.lower() in page, name
