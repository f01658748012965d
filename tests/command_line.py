"""The command line as a user starts it: a process in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start the command line in a folder of its own, as a user would."""
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "slope_compile_cli", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
