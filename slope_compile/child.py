"""Processes for what may crash or hang, or is chosen once per process: this Python with this process's search path."""

from __future__ import annotations

import json
import subprocess
import sys

from slope_compile.errors import BackendError

LAST_WORDS = 300  # characters of what a process that died had printed
_SAME_IMPORTS = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "


def command_of(code: str) -> list[str]:
    """Return the command that runs code in such a process, whatever the working directory.

    Args:
        code: Python.
    """
    return [sys.executable, "-c", _SAME_IMPORTS + code, json.dumps(sys.path)]


def ask(code: str, request: bytes, what: str) -> bytes:
    """Run code on a request and return all that it answers.

    Args:
        code: Python that reads the standard input and answers on the standard output.
        request: The standard input.
        what: What the process does with the engine, as in `ran`.

    Raises:
        BackendError: If it dies or answers nothing.
    """
    done = subprocess.run(command_of(code), input=request, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        last = " ".join(done.stderr.decode(errors="replace").split())[-LAST_WORDS:]
        raise BackendError(
            f"The process that {what} the engine died (exit code {done.returncode}): {last}", "Build it again."
        )
    return done.stdout
