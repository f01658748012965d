"""Each mutation is caught by the right check, and each correct variant passes, through the command itself."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from mutation import FILE_CHECKS, Mutation, Variant, problem_with, problem_with_naive
from mutation_list import MUTATIONS, VARIANTS
from mutation_runs import PACKED, command, copied, digest_of, judged_only, only, restamp, tried, verified
from packed_mutations import PACKED_ALONE

pytestmark = pytest.mark.e2e
Runs = Mapping[str, Path]
NAIVE = [mutation for mutation in MUTATIONS if mutation.naive]
WHOLE = {mutation.artifact: mutation for mutation in reversed(MUTATIONS)}  # tried with all that follows a judgement
FIRST = {mutation.artifact: mutation for mutation in reversed(NAIVE)}  # tried as it is by the command
FLOATS = ("a bias NaN", "running variance negative")  # files in order, of what no training should leave
EVERY = 10  # one row in so many is tried with all checks


@pytest.mark.parametrize(
    "subject", ["float", "other", "int8", "external", "unbuilt", "packed", "packed onnx", "bundle", "unpacked"]
)
def test_what_is_corrupted_was_in_order(runs: Runs, tmp_path: Path, subject: str) -> None:
    with copied(runs, subject, tmp_path) as copy:
        outcome = verified(copy.path)
    assert outcome.code == 0, outcome.told()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda one: one.name)
def test_caught_though_the_manifest_was_made_to_match(runs: Runs, tmp_path: Path, mutation: Mutation) -> None:
    whole = mutation is WHOLE[mutation.artifact]
    with ExitStack() as stack:
        if not whole:
            stack.enter_context(judged_only(report=mutation.artifact in ("metrics.json", "engine")))
        if not whole and not mutation.missed and MUTATIONS.index(mutation) % EVERY:
            stack.enter_context(only(FILE_CHECKS | mutation.by))
        outcome = tried(mutation, runs, tmp_path, forged=True)
    assert not problem_with(mutation, outcome), outcome.told()


@pytest.mark.parametrize("mutation", NAIVE, ids=lambda one: one.name)
def test_caught_as_it_is(runs: Runs, tmp_path: Path, mutation: Mutation, only_digest: None) -> None:
    by_command = mutation is FIRST[mutation.artifact] or mutation.subject == "unpacked"
    outcome = tried(mutation, runs, tmp_path, forged=False, judge=verified if by_command else digest_of)
    assert not problem_with_naive(outcome), outcome.told()


def test_unpack_refuses_what_verify_fails(runs: Runs, tmp_path: Path) -> None:
    for mutation in PACKED_ALONE:
        if (mutation.code == 2 or mutation.by == {"packed"}) and mutation.kind not in FLOATS:
            with copied(runs, mutation.subject, tmp_path) as copy:
                mutation.corrupt(copy)
                code, _, err = command("unpack", str(copy.file(PACKED)), "--json")
                assert (code, "Traceback" in err, len(list(copy.path.glob("*.unpacked")))) == (2, False, 0), mutation


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_passes(runs: Runs, tmp_path: Path, variant: Variant) -> None:
    with copied(runs, variant.subject, tmp_path) as copy:
        variant.change(copy)
        if copy.file("manifest.json").is_file():
            restamp(copy.path)
        with judged_only():
            outcome = verified(copy.path)
    assert outcome.code == 0, outcome.told()
