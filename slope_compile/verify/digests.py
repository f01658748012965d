"""`digest`: the files are those that the manifest speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slope_compile.artifacts import Mismatch
from slope_compile.verify.verdict import Check, NotCheckedError, listed


@dataclass(frozen=True)
class Digests:
    """What comparing files with a manifest gave.

    Args:
        files: How many files the manifest lists.
        mismatches: Those that are missing, or have another size or sha256.
    """

    files: int
    mismatches: Sequence[Mismatch] = ()


def check_digests(digests: Digests | None) -> Check:
    """Fail if a file is not what the manifest says."""
    if digests is None:
        raise NotCheckedError("there is no manifest to compare with")
    figures = {"files": digests.files, "mismatches": [mismatch.path for mismatch in digests.mismatches]}
    if digests.mismatches:
        return Check("digest", "fail", listed(str(mismatch) for mismatch in digests.mismatches), figures)
    return Check("digest", "pass", f"{digests.files} files have the manifest's size and sha256", figures)
