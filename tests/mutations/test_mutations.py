"""Each mutation is caught by the right check, and each correct variant passes, through the command itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
from mutation import Mutation, Variant, problem_with, problem_with_naive
from mutation_list import MUTATIONS, VARIANTS
from mutation_runs import copied, judged_only, restamp, tried, verified

pytestmark = pytest.mark.e2e
Runs = Mapping[str, Path]
NAIVE = [mutation for mutation in MUTATIONS if mutation.naive]
WHOLE = {mutation.artifact: mutation for mutation in reversed(MUTATIONS)}  # tried with all that follows a judgement


@pytest.mark.parametrize("subject", ["float", "other", "int8", "external", "unbuilt", "bundle", "unpacked"])
def test_what_is_corrupted_was_in_order(runs: Runs, tmp_path: Path, subject: str) -> None:
    with copied(runs, subject, tmp_path) as copy:
        outcome = verified(copy.path)
    assert outcome.code == 0, outcome.told()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_caught_though_the_manifest_was_made_to_match(runs: Runs, tmp_path: Path, mutation: Mutation) -> None:
    whole = mutation is WHOLE[mutation.artifact]
    with nullcontext() if whole else judged_only(report=mutation.artifact in ("metrics.json", "engine")):
        outcome = tried(mutation, runs, tmp_path, forged=True)
    assert not problem_with(mutation, outcome), outcome.told()


@pytest.mark.parametrize("mutation", NAIVE, ids=lambda one: one.name)
def test_caught_as_it_is(runs: Runs, tmp_path: Path, mutation: Mutation, only_digest: None) -> None:
    outcome = tried(mutation, runs, tmp_path, forged=False)
    assert not problem_with_naive(outcome), outcome.told()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_passes(runs: Runs, tmp_path: Path, variant: Variant) -> None:
    with copied(runs, variant.subject, tmp_path) as copy:
        variant.change(copy)
        restamp(copy.path)
        with judged_only():
            outcome = verified(copy.path)
    assert outcome.code == 0, outcome.told()
