"""Python 3.10, which JetPack 6 has, is the floor: its syntax is parsed here, its library is what mypy knows."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("slope_compile/**/*.py"), *ROOT.glob("cli/**/*.py")])
FLOOR = (3, 10)


def test_every_source_is_python_3_10() -> None:
    assert len(SOURCES) > 100
    for path in SOURCES:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=FLOOR)


@pytest.mark.parametrize(
    "text", ["type A = int", "def f[T](x: T) -> T: ...", "try: ...\nexcept* ValueError: ...", "class A[T]: ..."]
)
def test_newer_syntax_would_be_found(text: str) -> None:
    with pytest.raises(SyntaxError):
        ast.parse(text, feature_version=FLOOR)


def test_the_tools_are_told_the_floor() -> None:
    """With that version mypy refuses what is newer in the standard library: names, methods and arguments."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.10"
    assert project["tool"]["mypy"]["python_version"] == "3.10"
    assert project["tool"]["ruff"]["target-version"] == "py310"
