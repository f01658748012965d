"""Starts the process in which TensorRT works, and takes what it sends back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from slope_compile.build.addresses import TUNABLES
from slope_compile.build.worker import Built, Request
from slope_compile.errors import BackendError
from slope_compile.targets.backends import Backend

# The worker imports what this process would: same interpreter, same search path, whatever the working directory.
_WORKER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from slope_compile.build.worker import main; main()"
# TensorRT orders some of what it writes by address: of 40 builds of one model about two had other bytes. So the worker
# gets what makes addresses repeat: no address randomization (ADDR_NO_RANDOMIZE; a kernel that forbids it costs only
# that), a fixed hash seed, nothing whose length depends on where and by whom it is run, and `addresses.py`. Threads of
# the library that race are left: about one build in 240, so ahead of time the bytes that were built twice are taken.
MOST_BUILDS = 3
_PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH", "LANG", "LC_", "TMPDIR", "CUDA", "NVIDIA", "VIRTUAL_ENV")
_FIXED_ADDRESSES = (
    "import ctypes, os, sys; ctypes.CDLL(None).personality(0x0040000); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def build_repeated(request: Request, backend: Backend, folder: Path, log: Path, cache: bytes = b"") -> Built:
    """Return the first result that two builds agree on; of three that all differ, the last: the log is its own.

    Where kernels are measured no two builds agree, and one is made.

    Args:
        request: What to build.
        backend: With what.
        folder: Where the request's model is.
        log: Where everything that the process prints goes.
        cache: The timing cache to start from; empty: none.

    Raises:
        BackendError: As `run_worker`.
    """
    results = [run_worker(request, backend, folder, log, cache)]
    while not backend.needs_gpu and len(results) < MOST_BUILDS:
        again = run_worker(request, backend, folder, log, cache)
        if again in results:
            return again
        results.append(again)
    return results[-1]


def run_worker(request: Request, backend: Backend, folder: Path, log: Path, cache: bytes = b"") -> Built:
    """Build in a process of its own and return what it made.

    Args:
        request: What to build.
        backend: With what.
        folder: Where the request's model is.
        log: Where everything that the process prints goes.
        cache: The timing cache to start from; empty: none.

    Raises:
        BackendError: If the backend refuses the model or the timing cache, or dies.
        RuntimeError: If the worker has a bug.
    """
    command = [sys.executable, "-S", "-c", _FIXED_ADDRESSES, "-c", _WORKER, json.dumps(_search_path())]
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    with log.open("wb") as stderr:
        # subprocess.run ends the process if this one is interrupted.
        done = subprocess.run(
            command,
            input=request.to_json().encode() + b"\n" + cache,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**environment, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": TUNABLES},
            cwd=folder,
            check=False,
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BackendError(
            f"{backend.title} died ({name}) while it built the engine. Its last words: {_tail(log)}",
            "Out of memory? Otherwise report it to NVIDIA with the model.",
        )
    if done.returncode:
        raise RuntimeError(f"the build process failed with exit code {done.returncode}: {_tail(log)}")
    head, _, body = done.stdout.partition(b"\n")
    answer = json.loads(head)
    if "problem" in answer:
        raise BackendError(answer["problem"], answer["remedy"])
    return Built.from_answer(answer, body)


def _search_path() -> list[str]:
    """Return the import path without the working directory, unless this very package is in it."""
    home = Path(__file__).parents[2]
    return [entry for entry in sys.path if entry and (Path(entry) != Path.cwd() or Path(entry) == home)]


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return " / ".join(line.strip() for line in lines if line.strip())[-600:]
