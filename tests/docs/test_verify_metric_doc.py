"""The coverage that docs/verify.md tells is the one that was measured, and it is what the intervals promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULT: dict[str, Any] = json.loads((ROOT / "benchmarks/results/bootstrap.json").read_text())
TEXT = (ROOT / "docs/verify.md").read_text(encoding="utf-8")
LEAST = 0.91  # 95 % less what the worst of a hundred rows of 400 sets scatters
LEAST_MAP = 0.82  # told in the page: large drops of an mAP on few images


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def told(first: str) -> list[list[str]]:
    """The rows of the table whose head begins so."""
    lines = TEXT[TEXT.index(f"| {first}") :].split("\n\n")[0].splitlines()
    return [cells(line) for line in (lines[0], *lines[2:])]


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def covered(rows: list[dict[str, Any]]) -> str:
    """The least coverage of some rows, and the plain bootstrap's."""
    return f"{percent(min(row['coverage'] for row in rows))} ({percent(min(row['plain'] for row in rows))})"


def number(text: str) -> float:
    return float(text.replace(",", "").removesuffix(" %")) / (100 if text.endswith("%") else 1)


def test_the_drops_coverage_is_the_measured_one() -> None:
    head, *rows = told("images, drop")
    for row in rows:
        for change, cell in zip(head[1:], row[1:], strict=True):
            lost, won = (round(number(part), 6) for part in change.split(" / "))
            found = [r for r in RESULT["drop"] if (r["items"], r["lost"], r["won"]) == (int(number(row[0])), lost, won)]
            assert found and cell == covered(found), (row[0], change)
    assert len(rows) * (len(head) - 1) == len({(r["items"], r["lost"], r["won"]) for r in RESULT["drop"]})


def test_the_accuracies_coverage_is_the_measured_one() -> None:
    head, *rows = told("images, accuracy")
    measured = {(r["items"], r["accuracy"]): covered([r]) for r in RESULT["accuracy"]}
    shown = {
        (int(number(row[0])), round(number(name), 6)): cell
        for row in rows
        for name, cell in zip(head[1:], row[1:], strict=True)
    }
    assert shown == measured


def test_the_detectors_coverage_is_the_measured_one() -> None:
    head, *rows = told("images, mAP")
    for row in rows:
        found = [r for r in RESULT["map_drop"] if r["images"] == int(number(row[0]))]
        drops = [f"{100 * r['drop']:.1f} %" for r in found]
        assert (head[1:], row[1:]) == (drops, [covered([r]) for r in found])


def test_no_interval_claims_more_than_it_holds() -> None:
    assert min(r["coverage"] for r in (*RESULT["accuracy"], *RESULT["drop"])) >= LEAST
    assert min(r["coverage"] for r in RESULT["map_drop"]) >= LEAST_MAP
    assert "82 to 83 of 100 sets" in " ".join(TEXT.split())
