"""A run of the whole chain on a tiny model, made once and copied by the tests that damage it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Cli, Warm, ended, start
from prepared_runs import make_run

TINY_MODEL = """
from torch import nn

def tiny(classes):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 30, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(30), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, classes),
    )
"""
TINY_RECIPE = """
model: {name: tiny.py:tiny, classes: 4}
data: {source: fake:192, size: 8, batch: 32, workers: 0, augment: none}
train: {pretrain_epochs: 3, epochs: 3, lr: 0.02, pretrain_lr: 0.05}
export: {samples: 4}
build: {batch: {min: 1, opt: 4, max: 16}}
verify: {metric_drop: 0.5}
"""


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    process = Warm()
    yield process
    process.end()


@pytest.fixture(scope="session")
def cli(warm: Warm) -> Cli:
    """Runs a command in a process that was forked from a warm one."""
    return lambda *arguments, cwd: ended(warm.start(arguments, cwd), arguments)


@pytest.fixture(scope="session")
def cold_cli() -> Cli:
    """Runs a command in a process that starts from nothing, as a user's does."""
    return lambda *arguments, cwd: ended(start(arguments, cwd), arguments)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(TINY_MODEL)
    (folder / "tiny.yaml").write_text(TINY_RECIPE)
    return folder


@pytest.fixture(scope="session")
def finished(workplace: Path, cold_cli: Cli) -> Path:
    """The folder in which `run tiny.yaml` was done; tests read it and change nothing."""
    done = cold_cli("run", "tiny.yaml", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    (workplace / "run.json").write_text(done.stdout)
    json.loads(done.stdout)
    return workplace


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished folder, to damage."""
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    return folder


@pytest.fixture(scope="session")
def prepared(net: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small net with an engine, made without training; tests copy it."""
    return make_run(tmp_path_factory.mktemp("prepared") / "run", net, really=True).path
