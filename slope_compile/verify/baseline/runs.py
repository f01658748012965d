"""Two runs side by side: what both finished, read from the files that their manifests list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slope_compile.artifacts import FileDigest, RunFolder, read_json
from slope_compile.errors import ArtifactError
from slope_compile.recipe import BaselineSection
from slope_compile.verify.verdict import Check, NotCheckedError

OURS, THEIRS = "this run", "the baseline"


@dataclass(frozen=True)
class Compared:
    """A run and its baseline.

    Args:
        ours: The run that is verified.
        theirs: The baseline.
        target: Whose engines are compared.
        budgets: How much worse it may be.
        made: The checks of this verification, by name.
    """

    ours: RunFolder
    theirs: RunFolder
    target: str
    budgets: BaselineSection
    made: Mapping[str, Check]

    @property
    def build(self) -> str:
        """The stage of the engines."""
        return f"build/{self.target}"

    def both(self, name: str) -> tuple[Any, Any]:
        """Return a JSON file of a stage, of ours and of theirs.

        Raises:
            NotCheckedError: If one of them has none, or ours is not what its manifest lists.
        """
        return read_stage(self.ours, name, OURS), read_stage(self.theirs, name, THEIRS)


def read_stage(folder: RunFolder, name: str, whose: str) -> Any:
    """Return a finished stage's JSON file.

    Raises:
        NotCheckedError: If there is none, or it is not the one that the manifest lists.
    """
    stage = name.rpartition("/")[0]
    if stage not in folder.records:
        raise NotCheckedError(f"{whose} has no finished '{stage}'")
    path = folder.path / name
    if not path.is_file() or FileDigest.of(path) != folder.records[stage].outputs.get(name):
        raise NotCheckedError(f"{name} of {whose} is not the one that its manifest lists")
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise not_readable(whose, f"{name} of {whose} cannot be read: {error}", "Make it anew.") from None


def not_readable(whose: str, problem: str, remedy: str) -> Exception:
    """Return the error for a file of another form than ours: the baseline's may be another version's, and was proved.

    Args:
        whose: `OURS` or `THEIRS`.
        problem: Without its full stop.
        remedy: One sentence.
    """
    return NotCheckedError(problem) if whose == THEIRS else ArtifactError(f"{problem}.", remedy)
