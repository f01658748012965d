"""What a mutation is, and what it takes for one to count as caught."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Checks that look at bytes: they fail where they are stated, and nowhere else. The others compare one file's outputs or
# counts with another's: those that are stated fail, and what depends on the same file may fail with them.
FILE_CHECKS = frozenset({"digest", "pattern", "codes", "packed", "placement"})

ARTIFACTS = {
    "model.onnx": "the exported model",
    "model.onnx.data": "its tensors, where they are kept outside",
    "codes.safetensors": "the checkpoint's codes",
    "checkpoint.safetensors": "the checkpoint itself",
    "metrics.json": "what training measured",
    "validation.safetensors": "what the trained models answered to each image",
    "packed file": "model.slope, what the run stores and sends",
    "model.onnx alone": "the exported model with golden samples and layer list beside it, without a run",
    "packed file alone": "such a file, of a model or of an ONNX file, without a run",
    "golden.safetensors": "golden inputs and outputs",
    "layers.json": "what the export says of each layer",
    "placed.onnx": "what the engine is built from",
    "engine": "the engine and what is written down about it",
    "manifest": "manifest.json and recipe.yaml",
    "bundle": "the archive for a device",
    "unpacked bundle": "the same on the device, with an engine built from it",
}


@dataclass(frozen=True)
class Subject:
    """A copy to corrupt.

    Args:
        path: A run folder, an archive, or the folder of one.
        runs: The runs as they were made, by name: `float`, `int8`, `other` (another seed), `external`, `unpacked`; and
            the folders `alone`, `alone int8`, `packed`, `packed onnx` of a file without a run.
    """

    path: Path
    runs: Mapping[str, Path]

    def file(self, name: str) -> Path:
        return self.path / name


Corrupt = Callable[[Subject], None]


@dataclass(frozen=True)
class Mutation:
    """One corruption of one artifact.

    Args:
        kind: What is done.
        artifact: Key of ARTIFACTS.
        corrupt: Does it.
        by: Checks that must fail where the manifest was made to match. Of FILE_CHECKS exactly these.
        subject: Which of the runs is copied.
        code: Exit code.
        says: Where that is 2: a part of the error.
        forged: Whether it is tried with a manifest that was made to match; otherwise only as it is.
        naive: Whether it is tried with the manifest as it was, which must fail `digest`.
        header: Whether the forger mends the digests in the engine's layers.json too.
        missed: Why nothing catches it where the manifest was made to match; published as a miss.
    """

    kind: str
    artifact: str
    corrupt: Corrupt
    by: frozenset[str]
    subject: str = "float"
    code: int = 1
    says: str = ""
    forged: bool = True
    naive: bool = True
    header: bool = True
    missed: str = ""

    @property
    def name(self) -> str:
        return f"{self.artifact}: {self.kind}"


@dataclass(frozen=True)
class Variant:
    """A correct artifact that is written otherwise: every check must pass or be `not checked`, exit code 0."""

    kind: str
    artifact: str
    change: Corrupt
    subject: str = "float"

    @property
    def name(self) -> str:
        return f"{self.artifact}: {self.kind}"


@dataclass(frozen=True)
class Outcome:
    """What the command said."""

    code: int
    failed: frozenset[str]
    details: Mapping[str, str]
    problem: str

    def told(self) -> str:
        rows = [f"{name}: {self.details[name]}" for name in self.failed]
        return f"exit {self.code}; " + ("; ".join(rows) or self.problem or "everything passes")


def problem_with(mutation: Mutation, outcome: Outcome) -> str:
    """Return why an outcome is not the one that a forged mutation must have; empty where it is."""
    if mutation.missed:
        return "" if outcome.code == 0 else "it is caught now: say by what, instead of why not"
    if outcome.code != mutation.code:
        return f"exit code {outcome.code}, not {mutation.code}"
    if mutation.code == 2:
        return "" if mutation.says in outcome.problem else f"the error does not say '{mutation.says}'"
    if absent := mutation.by - outcome.failed:
        return f"{', '.join(sorted(absent))} did not fail"
    if more := (outcome.failed & FILE_CHECKS) - mutation.by:
        return f"{', '.join(sorted(more))} failed too"
    return ""


def problem_with_naive(outcome: Outcome) -> str:
    """Return why an outcome is not that of a file which the manifest does not describe; empty where it is."""
    if outcome.code != 1:
        return f"exit code {outcome.code}, not 1"
    return "" if "digest" in outcome.failed else "digest did not fail"
