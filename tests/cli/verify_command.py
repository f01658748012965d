"""`slope-compile verify` in this process, without torch and without a GPU: seconds less than as a user starts it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from slope_compile_cli.main import main

from slope_compile.verify.verdict import NotCheckedError

CI_VARIABLES = ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "GITHUB_WORKSPACE", "GITLAB_CI", "CI_PROJECT_DIR")


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def status(self) -> dict[str, str]:
        return {check["name"]: check["status"] for check in self.json["checks"]}


Run = Callable[..., Done]


def _no_torch() -> None:
    raise NotCheckedError("torch is not installed here")


def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, command: str | None = "verify"
) -> Run:
    """Return what runs a command, or if None the one that its first argument names, in a folder of no CI system."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("slope_compile.verify.parity.engine.find_gpu", lambda: None)
    monkeypatch.setattr("slope_compile.verify.run._require_torch", _no_torch)  # its import takes many seconds
    for name in CI_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def start(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["slope-compile", *([command] if command else []), *arguments])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return start
