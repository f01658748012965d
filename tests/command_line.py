"""The command line as a user starts it: a process in a folder of its own; and the same, forked from a warm process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SERVER = Path(__file__).with_name("warm.py")


def start(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start the command line in a folder of its own, as a user would."""
    command = [sys.executable, "-m", "slope_compile_cli", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def environment() -> dict[str, str]:
    """What the commands find in their environment."""
    return {**os.environ, "COLUMNS": "200"}


class Forked:
    """A command that the warm process forked; used like `subprocess.Popen`."""

    def __init__(self, server: subprocess.Popen[bytes], arguments: Sequence[str], folder: Path) -> None:
        self._server = server
        self._streams = [tempfile.NamedTemporaryFile("r") for _ in range(2)]  # noqa: SIM115 (closed when read)
        out, err = (stream.name for stream in self._streams)
        request = {"arguments": list(arguments), "folder": str(folder), "environment": environment()}
        assert server.stdin is not None and server.stdout is not None
        self._answers = server.stdout
        server.stdin.write(json.dumps(request | {"out": out, "err": err}).encode() + b"\n")
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self, seconds: float = 0) -> int | None:
        """The exit code, None while the command runs."""
        if self.returncode is None and select.select([self._answers], [], [], seconds)[0]:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send the command a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end; returns stdout and stderr."""
        if self.poll(timeout) is None:
            os.kill(self.pid, signal.SIGKILL)
            self.poll(timeout)
            raise subprocess.TimeoutExpired(f"slope-compile, forked as {self.pid}", timeout)
        told = [stream.read() for stream in self._streams]
        for stream in self._streams:
            stream.close()
        return told[0], told[1]


class Warm:
    """The warm process."""

    def __init__(self) -> None:
        # No buffer: an answer that lies in one is not seen by select.
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, str(SERVER)], stdin=pipe, stdout=pipe, bufsize=0)

    def start(self, arguments: Sequence[str], folder: Path) -> Forked:
        """Start the command line in a folder; one at a time."""
        return Forked(self._process, arguments, folder)

    def end(self) -> None:
        """End the warm process."""
        self._process.communicate(timeout=60)
        assert self._process.returncode == 0


def ended(process: subprocess.Popen[str] | Forked, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode or 0, out, err)
