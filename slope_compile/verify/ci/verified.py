"""What was verified, in the form that every report is made from; nothing in it depends on the time or the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

NOTHING = "no check could be made: nothing checked is nothing passed"
# Which file of a run a check speaks of; the others speak of the exported model.
FILES = {
    "digest": "manifest.json",
    "packed": "model.slope",
    "parity.placed": "build/{target}/placed.onnx",
    "parity.engine": "build/{target}/model.engine",
    "engine.layers": "build/{target}/layers.json",
    "baseline.latency": "build/{target}/model.engine",
    "baseline.sparse": "build/{target}/layers.json",
    "baseline.layers": "build/{target}/layers.json",
}
MODEL = "export/model.onnx"


class Finding(NamedTuple):
    """A reason for the verdict `fail`.

    Args:
        check: Name of the check; `verdict` where none could be made.
        target: For which it was made, None where there are none.
        title: What a person calls it.
        detail: What was found, one line.
        file: What it was found in, as the repository names it.
    """

    check: str
    target: str | None
    title: str
    detail: str
    file: str


@dataclass(frozen=True)
class Verified:
    """A verdict, and the artifact that it speaks of.

    Args:
        kind: What the artifact is.
        location: Its path, as the repository names it.
        verdict: verify.json's form; of several targets each check and each requirement with its `target`.
    """

    kind: Literal["run", "bundle", "onnx", "packed"]
    location: str
    verdict: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The artifact's file or folder."""
        return PurePosixPath(self.location).name or self.location

    @property
    def checks(self) -> Sequence[Mapping[str, Any]]:
        """All checks, in order."""
        return [{**check, "detail": plain(check["detail"])} for check in self.verdict["checks"]]

    @property
    def required(self) -> Sequence[Mapping[str, Any]]:
        """All requirements, in order."""
        return [{**row, "detail": plain(row["detail"])} for row in self.verdict["required"]]

    @property
    def targets(self) -> list[str | None]:
        """For which targets there are checks, in order."""
        return list(dict.fromkeys(check.get("target") for check in self.checks))

    def file_of(self, check: str, target: str | None) -> str:
        """Return the file that a check speaks of, as the repository names it."""
        if self.kind != "run":
            return self.location
        return f"{self.location}/{FILES.get(check, MODEL).format(target=target)}"

    def results_of(self, target: str | None) -> str:
        """Return where a run keeps what was found for a target; of a bundle or a file it is beside: nothing."""
        return f"{self.location}/verify/{target}/" if self.kind == "run" else ""

    def findings(self) -> list[Finding]:
        """Return why the verdict is `fail`, in order: failed checks, then required ones that did not pass."""
        failed = [check for check in self.checks if check["status"] == "fail"]
        found = [self._finding(check["name"], check, f"{check['name']} failed") for check in failed]
        told = {(finding.check, finding.target) for finding in found}
        found += [
            self._finding(row["name"], row, f"{row['name']} is required and is {row['status']}")
            for row in self.required
            if not row["met"] and (row["name"], row.get("target")) not in told
        ]
        if not found and self.verdict["verdict"] != "pass":
            found.append(Finding("verdict", None, "nothing was checked", NOTHING, self.file_of("digest", None)))
        return found

    def _finding(self, check: str, row: Mapping[str, Any], title: str) -> Finding:
        target = row.get("target")
        where = f"{title} ({target})" if target else title
        return Finding(check, target, where, row["detail"], self.file_of(check, target))


def plain(text: object) -> str:
    """Return text of one line without control characters: a damaged file can put any into a tensor's name."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return " ".join(shown.split())


def repository_path(path: Path, environment: Mapping[str, str]) -> str:
    """Return a path as the repository names it: relative to its root, which the CI system knows, else to this folder.

    One outside of it stays as it is.

    Args:
        path: The artifact.
        environment: The process's environment variables.
    """
    root = Path(environment.get("GITHUB_WORKSPACE") or environment.get("CI_PROJECT_DIR") or Path.cwd())
    absolute = path.absolute()
    for base, whole in ((root, Path(os.path.normpath(absolute))), (root.resolve(), absolute.resolve())):
        if whole.is_relative_to(base):
            return whole.relative_to(base).as_posix()
    return path.as_posix()
