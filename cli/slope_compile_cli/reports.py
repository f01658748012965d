"""`verify --ci`: the files that a CI system reads, and what GitHub wants printed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slope_compile.errors import SlopeCompileError, StorageError
from slope_compile_cli.console import Console

if TYPE_CHECKING:
    from slope_compile.verify.ci.verified import Verified


class Reports:
    """The reports of one `verify`.

    Args:
        console: Where to say what was written.
        artifact: What is verified.
        folder: Where the reports go; None without --ci: then nothing here does anything.
        among_results: Whether the verification keeps its results there too: they are taken away with the reports.
    """

    def __init__(self, console: Console, artifact: Path, folder: Path | None, among_results: bool) -> None:
        self._console, self._artifact, self._folder = console, artifact, folder
        self._among_results = among_results

    def prepare(self) -> None:
        """Make the folder before the verification begins: earlier reports are taken away, a full disk shows now.

        Raises:
            StorageError: If the folder cannot be written.
        """
        if self._folder is not None:
            from slope_compile.verify.ci.write import prepare_reports
            from slope_compile.verify.single import remove_results

            if self._among_results:
                remove_results(self._folder)
            prepare_reports(self._folder)

    def write(self, kind: Literal["run", "bundle", "onnx", "packed"], verdict: Mapping[str, Any]) -> dict[str, Any]:
        """Write the reports of a verdict and tell GitHub, if that is where this runs; return what --json adds.

        Raises:
            StorageError: If the file system refuses.
        """
        if self._folder is None:
            return {}
        from slope_compile.verify.ci.verified import Verified, repository_path
        from slope_compile.verify.ci.write import on_gitlab, write_reports

        verified = Verified(kind, repository_path(self._artifact, os.environ), verdict)
        written = write_reports(self._folder, verified, on_gitlab(os.environ))
        self._console.say(f"reports: {', '.join(str(path) for path in written)}")
        self._tell_github(verified)
        return {"reports": [str(path) for path in written]}

    def _tell_github(self, verified: Verified) -> None:
        from slope_compile.verify.ci.annotations import workflow_commands
        from slope_compile.verify.ci.write import append_summary, on_github

        if not on_github(os.environ):
            return
        for line in workflow_commands(verified):
            _raw(line)
        if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
            try:
                append_summary(Path(summary), verified)
            except StorageError as error:  # the verdict stands, and so do its reports
                self._console.say(f"no summary for the step: {error}")

    @contextmanager
    def told(self) -> Iterator[None]:
        """Tell GitHub of what stops the verification; no report is left then, not even one of an earlier verdict."""
        try:
            yield
        except (SlopeCompileError, OSError) as error:
            if self._folder is not None:
                self._could_not(self._folder, error)
            raise

    def _could_not(self, folder: Path, error: Exception) -> None:
        from slope_compile.verify.ci.annotations import workflow_command
        from slope_compile.verify.ci.write import on_github, remove_reports, reports_in
        from slope_compile.verify.single import remove_results

        with suppress(OSError, StorageError):  # that one is told of
            if self._among_results and reports_in(folder):
                remove_results(folder)
            elif not self._among_results:
                remove_reports(folder)
        if on_github(os.environ):
            _raw(workflow_command("error", "could not verify", str(error)))


def _raw(line: str) -> None:
    """Print a line that no width may break, where --json has not the one object."""
    sys.stderr.write(line + "\n")
