from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from slope_compile.placement.cost import DEQUANTIZATION, SPARSE_BYTES, TIE
from slope_compile.placement.passes.gemm import FORMS
from slope_compile.placement.rules import PLACEMENTS, RULES, SPARSE_CHANNELS, Rule
from slope_compile.qdq.matrices import BLOCKS
from slope_compile.targets.backends import BACKENDS

DOC = (Path(__file__).parents[2] / "docs" / "placement.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, "the same" written out."""
    lines = DOC.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    for before, row in pairwise(rows):
        row[1] = before[1] if row[1] == "the same" else row[1]
    return rows


def unlinked(cell: str) -> str:
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", cell)


def about(cell: str) -> set[str]:
    named = set(re.findall(r"`([a-z0-9-]+)`", cell))
    return set(PLACEMENTS) - named if cell.startswith("all but") else named


def test_every_placement_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", DOC, re.MULTILINE)
    assert sorted(rows) == sorted(PLACEMENTS)


@pytest.mark.parametrize("rule", RULES, ids=[rule.broken.__name__ for rule in RULES])
def test_every_rule_has_a_row_with_its_source(rule: Rule) -> None:
    cells = [unlinked(row[2]).split("; ") for row in table("Rules") if about(row[1]) == set(rule.placements)]
    assert any(set(rule.source.split("; ")) <= set(cell) for cell in cells), (rule.placements, rule.source)


def test_every_form_has_a_row_with_its_source() -> None:
    rows = [(row[0], row[2], row[3], row[4]) for row in table("Gemm or MatMul")]
    said = [(BACKENDS[form.backend].title, f"`{form.placement}`", form.op, form.source) for form in FORMS]
    assert [row for row in rows if row[2] != "as exported"] == said


def test_the_constants_are_those_of_the_code() -> None:
    assert f"within {TIE:.0%} of it".replace("%", " %") in DOC
    assert f"both {SPARSE_CHANNELS} or more" in DOC
    assert "work × 4/3" in DOC and DEQUANTIZATION == 4 / 3
    assert (
        f"{SPARSE_BYTES['FLOAT16']} of an FP16 weight's bytes are read, {SPARSE_BYTES['INT8']} of an INT8 one's" in DOC
    )
    assert BLOCKS == (128, 64) and "128 before 64" in DOC
