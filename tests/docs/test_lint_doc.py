"""docs/lint.md lists every lint rule as the registry has it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import slope_compile.lint.check  # noqa: F401  fills the registry
from slope_compile.lint.rules import RULES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")


def rows() -> dict[str, list[str]]:
    cells = [re.split(r"(?<!\\)\|", line.strip("|")) for line in TEXT.splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip().replace("\\|", "|") for cell in row[1:]] for row in cells}


def test_every_rule_has_its_row() -> None:
    sys.path.insert(0, str(ROOT / "tests" / "lint"))
    try:
        from lint_cases import BROKEN
    finally:
        sys.path.pop(0)
    mended = {rule for rule, level, *_ in BROKEN if level == "warning" and RULES[rule].level == "error"}
    expected = {
        rule.id: ["error*" if rule.id in mended else rule.level, rule.title, rule.source] for rule in RULES.values()
    }
    assert rows() == expected


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", TEXT):
        assert (ROOT / "docs" / target).exists(), target
