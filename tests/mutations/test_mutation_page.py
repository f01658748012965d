"""docs/mutations.md is what the suite tries; and the suite itself can fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from mutation import ARTIFACTS, Mutation, Outcome, problem_with, problem_with_naive
from mutation_list import MUTATIONS, VARIANTS
from mutation_page import PAGE, render
from mutation_runs import judged_only, tried

from slope_compile.verify.laws.digests import Digests
from slope_compile.verify.verdict import Check

CHECKS = (
    "pattern", "codes", "packed", "repeatable", "parity.onnx", "parity.placed", "parity.engine", "engine.layers",
    "metric",
)  # fmt: skip


def test_the_page_is_what_the_suite_tries() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python tests/mutations/mutation_page.py"


def test_a_new_mutation_is_not_on_the_page() -> None:
    more = replace(MUTATIONS[0], kind="something new")
    assert render([*MUTATIONS, more]) != PAGE.read_text(encoding="utf-8")


def test_what_the_issue_asks_for() -> None:
    assert len({mutation.kind for mutation in MUTATIONS}) >= 40
    assert len(VARIANTS) >= 20
    assert {mutation.artifact for mutation in MUTATIONS} == set(ARTIFACTS)
    caught_by = Counter(check for mutation in MUTATIONS if not mutation.missed for check in mutation.by)
    assert all(caught_by[check] for check in (*CHECKS, "digest", "placement"))
    names = Counter(one.name for one in (*MUTATIONS, *VARIANTS))
    assert [name for name, count in names.items() if count > 1] == []


def test_a_row_says_by_what_or_why_not() -> None:
    for mutation in MUTATIONS:
        assert bool(mutation.by) + bool(mutation.missed) + (mutation.code == 2) == 1, mutation.name


@pytest.mark.e2e
@pytest.mark.parametrize("check", CHECKS)
def test_a_check_that_is_switched_off_leaves_its_rows_uncaught(
    runs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    row = next(row for row in MUTATIONS if check in row.by and row.subject in ("float", "int8") and row.code == 1)
    switch_off(monkeypatch, check)
    with judged_only():
        outcome = tried(row, runs, tmp_path, forged=True)
    assert problem_with(row, outcome) in (f"{check} did not fail", "exit code 0, not 1"), outcome.told()


@pytest.mark.e2e
def test_a_digest_that_is_switched_off_is_seen(
    runs: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_digest: None
) -> None:
    monkeypatch.setattr("slope_compile.verify.run.digests_of", lambda folder, stages: Digests(1))
    outcome = tried(next(row for row in MUTATIONS if row.naive), runs, tmp_path, forged=False)
    assert problem_with_naive(outcome) == "exit code 0, not 1"


def switch_off(monkeypatch: pytest.MonkeyPatch, check: str) -> None:
    """Let one check pass whatever it is given."""
    from slope_compile.verify import model

    attempt = model.attempt
    blind = Check(check, "pass", "switched off")
    monkeypatch.setattr(model, "attempt", lambda name, make: blind if name == check else attempt(name, make))


def outcome(code: int, *failed: str, problem: str = "") -> Outcome:
    return Outcome(code, frozenset(failed), dict.fromkeys(failed, ""), problem)


def test_what_counts_as_caught() -> None:
    row = Mutation("kind", "model.onnx", lambda _: None, frozenset({"codes"}))
    assert problem_with(row, outcome(1, "codes", "parity.onnx", "metric")) == ""
    assert problem_with(row, outcome(0)) == "exit code 0, not 1"
    assert problem_with(row, outcome(2, problem="bad")) == "exit code 2, not 1"
    assert problem_with(row, outcome(1, "parity.onnx")) == "codes did not fail"
    assert problem_with(row, outcome(1, "codes", "pattern")) == "pattern failed too"
    refused = replace(row, by=frozenset(), code=2, says="not a bundle")
    assert problem_with(refused, outcome(2, problem="x is not a bundle")) == ""
    assert problem_with(refused, outcome(2, problem="y")) == "the error does not say 'not a bundle'"
    assert problem_with(refused, outcome(1, "codes")) == "exit code 1, not 2"
    missed = replace(row, by=frozenset(), missed="no sample shows it")
    assert problem_with(missed, outcome(0)) == ""
    assert problem_with(missed, outcome(1, "codes")) != ""
    assert problem_with_naive(outcome(1, "digest", "codes")) == ""
    assert problem_with_naive(outcome(1, "codes")) == "digest did not fail"
    assert problem_with_naive(outcome(0)) == "exit code 0, not 1"
