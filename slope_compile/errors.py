"""The exceptions that slope-compile raises on purpose.

* SlopeCompileError            exit 2: the user can mend it
  x RecipeError                a key, value or option of a recipe
  x DataError                  a data set or one of its items
  x ModelError                 a model that cannot be found, built or compressed
  x TrainingError              training that cannot go on (loss is NaN, another recipe's state)
  x ArtifactError              a file of ours that is missing, truncated, edited or foreign
    x LaterFormatError           one that a later version of slope-compile wrote
  x BackendError               TensorRT, its version, the target or the GPU
  x StorageError               the file system: full, read-only, not ours
* CheckFailedError             exit 1: the tool worked, the artifact is not what it should be

Anything else that escapes is a bug of ours (exit 101).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlopeCompileError(Exception):
    """An error that the user can mend.

    Args:
        problem: What was wrong, where, and the offending value; one or two sentences.
        remedy: What to do about it; one sentence.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem} {remedy}")


class RecipeError(SlopeCompileError):
    """A key, a value or an option of a recipe is not usable."""


class DataError(SlopeCompileError):
    """A data set, or one item of it, is not usable."""


class ModelError(SlopeCompileError):
    """A model cannot be found, built or compressed."""


class TrainingError(SlopeCompileError):
    """Training cannot go on."""


class ArtifactError(SlopeCompileError):
    """A file written by slope-compile is missing, truncated, edited or of another run."""


class LaterFormatError(ArtifactError):
    """A file is of a format that a later version of slope-compile writes."""


class BackendError(SlopeCompileError):
    """TensorRT, its version, the target or the GPU does not allow what was asked for."""


class StorageError(SlopeCompileError):
    """The file system refused."""


class CheckFailedError(Exception):
    """A verification ran and found the artifact wanting."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean 'x'?` for the known name nearest to `word`, else the list of known names.

    Args:
        word: What the user wrote.
        known: The names that would have been accepted.
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(names)}."
