from __future__ import annotations

import re
from pathlib import Path

from slope_compile.placement.cost import DEQUANTIZATION, SPARSE_BYTES, TIE
from slope_compile.placement.passes.gemm import FORMS
from slope_compile.placement.rules import PLACEMENTS, RULES, SPARSE_CHANNELS
from slope_compile.qdq.matrices import BLOCKS

DOC = (Path(__file__).parents[2] / "docs" / "placement.md").read_text(encoding="utf-8")


def words(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+#?\d*|#\d+", text)) - {"the", "vendor", "s"}


def test_every_placement_has_its_row() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", DOC, re.MULTILINE)
    assert sorted(rows) == sorted(PLACEMENTS)


def test_every_source_of_a_rule_is_named() -> None:
    for rule in (*RULES, *FORMS):
        issues = re.findall(r"#\d+", rule.source)
        assert all(issue in DOC for issue in issues), rule.source
        assert len(words(rule.source) & words(DOC)) >= 0.6 * len(words(rule.source)), rule.source


def test_the_constants_are_those_of_the_code() -> None:
    assert f"within {TIE:.0%} of it".replace("%", " %") in DOC
    assert f"both {SPARSE_CHANNELS} or more" in DOC
    assert "work × 4/3" in DOC and DEQUANTIZATION == 4 / 3
    assert (
        f"{SPARSE_BYTES['FLOAT16']} of an FP16 weight's bytes are read, {SPARSE_BYTES['INT8']} of an INT8 one's" in DOC
    )
    assert BLOCKS == (128, 64) and "128 before 64" in DOC
