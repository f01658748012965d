"""The figures in the documents are those of the committed result files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ablation.arms import main_arms, study_arms
from benchmarks.ablation.summary import summarize

ROOT = Path(__file__).parents[2]
RESULT = json.loads((ROOT / "benchmarks/results/ablation-small.json").read_text())
SUMMARY: dict[str, Any] = RESULT["summary"]


def told(arm: str) -> str:
    return f"{SUMMARY[arm]['mean']:.2f} ± {SUMMARY[arm]['sd']:.2f}"


def rows_of(page: str) -> list[list[str]]:
    lines = (ROOT / page).read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_summary_is_that_of_the_rows() -> None:
    assert summarize(RESULT["rows"]) == SUMMARY


def test_every_arm_was_run_on_five_seeds_and_ten_thousand_images() -> None:
    assert {name: figures["seeds"] for name, figures in SUMMARY.items()} == {
        arm.name: 5 for arm in (*main_arms(), *study_arms())
    }
    assert RESULT["scale"]["validation"] == 10_000


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_tables_tell_the_measured_accuracies(bits: int) -> None:
    row = next(row for row in rows_of("docs/ablation.md") if row[0] == f"{bits} bits, accuracy %")
    assert row[1:] == [told(f"{penalty} W{bits}") for penalty in ("none", "l2", "sr-ste", "cosine")]
    row = next(row for row in rows_of("README.md") if row[0] == f"{bits} bits")
    assert row[1:3] == [told(f"none W{bits}"), told(f"cosine W{bits}")]
    aligned = re.findall(r"0\.\d{3}", row[3])
    assert aligned == [f"{SUMMARY[f'{penalty} W{bits}']['cosine']:.3f}" for penalty in ("none", "cosine")]


def test_the_study_s_table_tells_every_arm() -> None:
    rows = {row[0]: row[1:] for row in rows_of("docs/ablation.md")}
    for arm in study_arms():
        difference = SUMMARY[arm.name][f"against none W{arm.bits}"]
        assert rows[arm.name] == [
            told(arm.name),
            f"{difference['mean'] + 0.0:+.2f} ± {difference['ci95']:.2f}".replace("-", "−"),
        ]


def test_dense_is_named_on_both_pages() -> None:
    for page in ("README.md", "docs/ablation.md"):
        assert told("dense") in (ROOT / page).read_text()
