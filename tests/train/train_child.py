"""A process that imports torch once and then runs each order in a fork of its own, so that a SIGKILL costs no import.

Orders on stdin, one JSON object a line, {"what": "train" or "commit", "recipe", "out", "state", "ranks", "port",
"kill": [POINT, COUNT] or null}. A fork kills itself with SIGKILL at the COUNT-th progress event or file-system step.
Answers: one wait status a line. `commit` only saves the states of a small module after epochs 1 and 2.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from train_files import commit

from slope_compile import artifacts
from slope_compile.events import Events
from slope_compile.recipe import recipe_from
from slope_compile.train import checkpoint
from slope_compile.train.loop import train


class Countdown:
    """Kills this process when it has been called `count` times."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def watch_files(countdown: Countdown) -> None:
    """Count before and after each step that a commit makes on the disk."""

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            countdown()
            result = function(*arguments, **keywords)
            countdown()
            return result

        return call

    artifacts.sync = checkpoint.sync = counted(artifacts.sync)
    checkpoint.save_file = counted(checkpoint.save_file)
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]
    Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]


def run(order: dict[str, Any]) -> None:
    point, count = order["kill"] or ("none", 0)
    countdown = Countdown(count)
    state = Path(order["state"])
    if order["what"] == "commit":
        commit(state, 1)
        watch_files(countdown)
        commit(state, 2)
        return
    if point == "file":
        watch_files(countdown)
    events = Events(listeners=[lambda event: countdown() if event["kind"] == point else None])
    out = Path(order["out"])
    out.mkdir(exist_ok=True)
    train(recipe_from(order["recipe"], "test"), out, state, events)


def fork(order: dict[str, Any], rank: int) -> int:
    """Start one rank, with the environment that torchrun gives it, and return its process id."""
    child = os.fork()
    if child:
        return child
    if order["ranks"] > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "LOCAL_WORLD_SIZE": order["ranks"]}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(order["port"])})
    try:
        run(order)
    except BaseException:
        sys.stderr.write(traceback.format_exc())
        sys.stderr.flush()
        os._exit(3)
    os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not garbage: each fork would look through it again
    for line in sys.stdin:
        order = json.loads(line)
        children = [fork(order, rank) for rank in range(order["ranks"])]
        sys.stdout.write(f"{max(os.waitpid(child, 0)[1] for child in children)}\n")
        sys.stdout.flush()


main()
