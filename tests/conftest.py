from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from onnx_nets import coded, save, sparse_codes, tensor

Write = Callable[..., Path]
TOGETHER = ("tests/mutations/", "tests/cli/")  # on one worker: each trains a run that its tests share
LONGEST = (*TOGETHER, "tests/train/", "tests/placement/", "tests/export/")
os.environ["OMP_NUM_THREADS"] = "1"  # models this small take longer with threads; a worker has a core of its own
os.environ.pop("COLUMNS", None)  # a worker is given 80, and then tables break their cells


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several workers share the tests, what takes longest comes first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


def pytest_collection_finish() -> None:
    """What was imported stays; collecting garbage, which some libraries do all the time, need not look through it."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At the end it is taken apart like the rest."""
    gc.unfreeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What one worker runs in one go: a file, for the sake of its fixtures, or a folder."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes conv (INT4 or INT2, per channel, 2:4) -> relu -> mean -> Gemm (INT4, blocks of 128) -> float Gemm."""

    def write(conv: str = "INT4", gemm: str = "INT4", shape: tuple[Any, ...] = ("batch", 4, 6, 6)) -> Path:
        rng = np.random.default_rng(1)
        low, high = (-2, 1) if conv == "INT2" else (-7, 7)
        c, c_dq = coded("c.weight", sparse_codes((128, 4, 3, 3), low, high), np.full(128, 0.5), conv, axis=0)
        f, f_dq = coded("f.weight", rng.integers(-7, 8, (8, 128)), np.full((8, 1), 0.25), gemm, axis=1, block_size=128)
        h = tensor("h.weight", rng.normal(size=(3, 8)), "FLOAT")
        nodes = [
            c_dq,
            f_dq,
            helper.make_node("Conv", ["x", "c.weight"], ["c"], name="c", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], name="r"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="p"),
            helper.make_node("Flatten", ["p"], ["v"], name="v"),
            helper.make_node("Gemm", ["v", "f.weight"], ["f"], name="f", transB=1),
            helper.make_node("Gemm", ["f", "h.weight"], ["h"], name="h", transB=1),
        ]
        path = tmp_path_factory.mktemp("net") / "model.onnx"
        return save(path, nodes, [*c, *f, h], list(shape), "h", 25 if conv == "INT2" else 21)

    return write
