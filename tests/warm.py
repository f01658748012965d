"""A process that has imported what the commands import, and forks for each of them: seconds less than from nothing.

What it forks is a process of its own: folder, environment, streams, exit code, signals. What shows only while a
program starts (a package that is missing, PYTHONPATH, Ctrl-C during the imports) needs `command_line.start`.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

# Not onnxruntime: its import starts a thread, and threads do not survive a fork.
IMPORTED = (
    "torch", "torch._dynamo", "torchvision", "timm", "torchmetrics", "accelerate", "sklearn.datasets", "onnx_ir",
    "onnxscript", "slope_compile_cli.main", "slope_compile.export.float_graph",
)  # fmt: skip


def serve() -> None:
    """Read commands, one JSON object per line; answer each one with its process id, and, when it ended, its code."""
    for name in IMPORTED:
        importlib.import_module(name)
    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: one of {IMPORTED} starts some, set OMP_NUM_THREADS=1 or import it later"
    gc.freeze()  # what all share is not copied by being looked at
    while line := sys.stdin.readline():
        child = os.fork()
        if not child:
            become(**json.loads(line))
        answer(child)
        answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def answer(number: int) -> None:
    """Tell whoever asked."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def become(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> NoReturn:
    """Run the command line here and end with its exit code."""
    for path, flags, stream in ((os.devnull, os.O_RDONLY, 0), (out, os.O_WRONLY, 1), (err, os.O_WRONLY, 2)):
        opened = os.open(path, flags)
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = str(Path.cwd())  # as `python -m` has it
    sys.argv = ["slope-compile", *arguments]
    from slope_compile_cli.entry import main

    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the modules of the warm process apart would copy them first


if __name__ == "__main__":
    serve()
