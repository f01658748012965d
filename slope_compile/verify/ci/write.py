"""The reports in one folder, all of them or none: a CI system never finds half of them, nor those of another commit."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from slope_compile.artifacts import storage_errors
from slope_compile.errors import StorageError
from slope_compile.verify.ci.junit import junit
from slope_compile.verify.ci.markdown import markdown
from slope_compile.verify.ci.quality import code_quality
from slope_compile.verify.ci.sarif import sarif
from slope_compile.verify.ci.verified import Verified

JUNIT, JSON, SARIF, SUMMARY = "junit.xml", "verify.json", "verify.sarif", "summary.md"
QUALITY = "gl-code-quality-report.json"  # GitLab alone reads it
NAMES = (JUNIT, JSON, SARIF, SUMMARY, QUALITY)


def on_github(environment: Mapping[str, str]) -> bool:
    """Whether this process runs in GitHub Actions."""
    return environment.get("GITHUB_ACTIONS") == "true"


def on_gitlab(environment: Mapping[str, str]) -> bool:
    """Whether this process runs in GitLab CI."""
    return environment.get("GITLAB_CI") == "true"


def prepare_reports(folder: Path) -> None:
    """Make the folder and take away the reports of an earlier verification, before a new one begins.

    Raises:
        StorageError: If it cannot be made or written.
    """
    with storage_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise StorageError(f"{folder} is a file, not a folder for reports.", "Name another one with --out.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # found out now, not after the verification
        for name in NAMES:
            (folder / name).unlink(missing_ok=True)


def reports_in(folder: Path) -> bool:
    """Whether a folder has reports of an earlier verification: without this one the others are not ours."""
    return (folder / SARIF).is_file()


def remove_reports(folder: Path) -> None:
    """Take away the reports of an earlier verification, where a folder has them."""
    if reports_in(folder):
        for name in NAMES:
            (folder / name).unlink(missing_ok=True)


def write_reports(folder: Path, verified: Verified, gitlab: bool) -> list[Path]:
    """Write every report, and return their paths.

    Args:
        folder: Made by `prepare_reports`.
        verified: What is told.
        gitlab: Write GitLab's code quality report too.

    Raises:
        StorageError: If the file system refuses; no report is left then.
    """
    told = json.dumps({"artifact": verified.location, **verified.verdict}, indent=1, allow_nan=False) + "\n"
    contents = {
        JUNIT: junit(verified),
        JSON: told.encode(),
        SARIF: sarif(verified),
        SUMMARY: markdown(verified).encode(),
    }
    if gitlab:
        contents[QUALITY] = code_quality(verified)
    work = folder / ".reports"
    with storage_errors(folder):
        try:
            work.mkdir(exist_ok=True)
            for name, data in contents.items():
                (work / name).write_bytes(data)
            for name in contents:
                (work / name).replace(folder / name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return [folder / name for name in contents]


def append_summary(path: Path, verified: Verified) -> None:
    """Append the Markdown summary to the file that GitHub shows for a step.

    Raises:
        StorageError: If it cannot be written.
    """
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(markdown(verified))
