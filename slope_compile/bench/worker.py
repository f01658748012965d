"""The process in which engines are measured: it loads all of them, measures in turn, answers, ends.

The standard input brings the request as JSON, the standard output takes the answer as JSON. What anybody prints goes
to the standard error.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from slope_compile.bench.measure import Plan, in_turn
from slope_compile.bench.runner import EngineRunner
from slope_compile.bench.statistics import compare, describe
from slope_compile.errors import BackendError
from slope_compile.targets.backends import BACKENDS, select_in_polygraphy


def main() -> None:
    """Read a request, measure, answer."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # C++ code that prints to the standard output must not write into the answer
    request = json.load(sys.stdin)
    try:
        found = measure(request)
    except OSError as error:  # libcudart, which Polygraphy copies with
        found = {"not_checked": f"the CUDA runtime is not usable here: {error}"}
    except BackendError as error:
        found = {"problem": error.problem, "remedy": error.remedy}
    with answer:
        json.dump(found, answer)


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Return what was measured.

    Args:
        request: `backend`, `engines` (name -> `path`, `sha256`; the engine first, then the dense one if any), `shapes`,
            `batch`, `plan`.

    Raises:
        BackendError: If an engine does not load or run.
    """
    trt = select_in_polygraphy(BACKENDS[request["backend"]])  # before anything else imports Polygraphy
    from polygraphy.exception import PolygraphyException

    try:
        runners = {
            name: EngineRunner(trt, Path(engine["path"]), engine["sha256"], request["shapes"])
            for name, engine in request["engines"].items()
        }
        rounds = in_turn(runners, Plan(**request["plan"]), time.perf_counter)
    except PolygraphyException as error:
        raise BackendError(f"CUDA refused: {error}", "Is another program using the GPU?") from None
    found: dict[str, Any] = {
        name: {
            **describe(rounds[name], request["batch"]),
            "cuda_graph": runner.graph is not None,
            "no_cuda_graph": runner.no_graph,
        }
        for name, runner in runners.items()
    }
    if len(rounds) == 2:
        found["faster"] = compare(*rounds.values())
    return found
