"""docs/engine.md names every key of a row, every figure and operator, and the line as it is printed."""

from __future__ import annotations

from pathlib import Path

import pytest

from slope_compile.bench.measure import Plan
from slope_compile.build.counts import summary_line
from slope_compile.build.gate import FIGURES, OPERATORS
from slope_compile.build.rows import _absent

TEXT = (Path(__file__).parents[2] / "docs" / "engine.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", sorted(_absent("")))
def test_every_key_of_a_row_is_told(key: str) -> None:
    assert f"`{key}`" in TEXT


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_every_figure_is_told(name: str) -> None:
    assert f"| `{name}` |" in TEXT
    assert FIGURES[name].title in TEXT or name in ("eligible", "int4")


def test_every_operator_is_told() -> None:
    assert all(f"`{operator}`" in TEXT for operator in OPERATORS)


def test_the_line_and_the_plan() -> None:
    sparse = {"eligible": "n", "chosen": "k"}
    line = summary_line({"sparse": sparse, "layers": "m", "int4": {"fused": "j"}, "float": "i"})
    assert line == "n of m layers eligible for sparse kernels, k chosen; INT4 fused in j; float left in i"
    assert f"    {line}\n" in TEXT
    assert Plan().rounds == 10 and "ten rounds each" in TEXT
    assert f"{Plan().warm_up_s} s that" in TEXT
