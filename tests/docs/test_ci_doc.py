"""docs/ci.md names every check, option, report and budget."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from slope_compile_cli import verify

from slope_compile.recipe import BaselineSection
from slope_compile.verify.baseline.check import SAME
from slope_compile.verify.ci.write import NAMES
from slope_compile.verify.require import CHECKS, FAMILIES

TEXT = (Path(__file__).parents[2] / "docs" / "ci.md").read_text(encoding="utf-8")
OPTIONS = {"settings": "--set", "artifact": "RUN"}


@pytest.mark.parametrize("name", [*CHECKS, *FAMILIES, *NAMES, *(key for keys in SAME.values() for key in keys)])
def test_it_names(name: str) -> None:
    assert f"`{name}`" in TEXT


def test_it_names_every_option() -> None:
    for name in inspect.signature(verify.command).parameters:
        assert OPTIONS.get(name, f"--{name.replace('_', '-')}") in TEXT


def test_it_tells_the_budgets() -> None:
    for name, value in BaselineSection().model_dump().items():
        assert f"`{name}` {value}" in TEXT
