"""A run killed with SIGKILL at any moment and started again ends in the same bytes as one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from torch import nn, optim
from train_files import commit

from slope_compile.recipe import Recipe
from slope_compile.train.checkpoint import find_state, restore
from slope_compile.train.data import load_data
from slope_compile.train.trained import CHECKPOINT, CODES, METRICS, evaluate, load_trained, measure
from slope_compile.train.validation import FILE as VALIDATION
from slope_compile.train.validation import flatten, load_record

pytestmark = pytest.mark.e2e
FILES = (CHECKPOINT, CODES, METRICS, VALIDATION)


class Start(Protocol):
    """Runs a training (or, without a recipe, two commits) in a fork and returns its wait status."""

    def __call__(self, recipe: Recipe | None, folder: Path, kill: list[Any] | None, ranks: int = 1) -> int: ...


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    script = Path(__file__).with_name("train_child.py")
    child = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def order(recipe: Recipe | None, folder: Path, kill: list[Any] | None, ranks: int = 1) -> int:
        assert child.stdin is not None
        assert child.stdout is not None
        orders = {"what": "commit"} if recipe is None else {"what": "train", "recipe": recipe.model_dump(mode="json")}
        paths = {"out": str(folder / "out"), "state": str(folder / "state")}
        child.stdin.write(json.dumps({**orders, "kill": kill, "ranks": ranks, "port": free_port(), **paths}) + "\n")
        child.stdin.flush()
        return int(child.stdout.readline())

    yield order
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    child.stdout.close()
    child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in FILES}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def killed(status: int) -> bool:
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resumed_runs_end_in_the_same_bytes(
    make_recipe: Callable[..., Recipe], start: Start, tmp_path: Path, optimizer: str
) -> None:
    recipe = make_recipe(train={"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.002})
    whole = fresh(tmp_path / "whole")
    assert start(recipe, whole, None) == 0
    expected = digests(whole)
    again = fresh(tmp_path / "again")
    # In the first FP32 epoch, at its last step, across the change of phase, in a commit of either phase.
    for kill in (["progress", 1], ["progress", 4], ["file", 11], ["progress", 3], ["progress", 1], ["file", 5]):
        assert killed(start(recipe, again, kill)), f"was not killed at {kill}"
    assert start(recipe, again, None) == 0
    assert digests(again) == expected
    # Finished, but not committed by the pipeline: the outputs come from the state alone.
    shutil.rmtree(again / "out")
    assert start(recipe, again, None) == 0
    assert digests(again) == expected


def test_permuted_runs_resume_to_the_same_bytes(
    make_recipe: Callable[..., Recipe], start: Start, tmp_path: Path
) -> None:
    recipe = make_recipe(compression={"permute": True})
    whole = fresh(tmp_path / "whole")
    assert start(recipe, whole, None) == 0
    again = fresh(tmp_path / "again")
    for kill in (["progress", 3], ["progress", 3], ["progress", 3]):  # before, at and after the change of phase
        assert killed(start(recipe, again, kill)), f"was not killed at {kill}"
    assert start(recipe, again, None) == 0
    assert digests(again) == digests(whole)
    metrics = json.loads((whole / "out" / METRICS).read_text())
    before, after = metrics["permutation"]["kept"]["3"]
    assert before < after
    # The checkpoint's weights are permuted: loading it searches nothing and measures what training measured.
    model = load_trained(recipe, whole / "out")
    data = load_data(recipe.data, recipe.train.seed, recipe.model.classes)
    measured = evaluate(model, data.validation, recipe.data.batch)
    assert measured["accuracy"] == metrics["compressed"]["accuracy"]


def test_a_kill_at_any_step_of_a_commit_leaves_the_old_state_or_the_new(start: Start, tmp_path: Path) -> None:
    found = []
    for count in range(1, 100):
        folder = fresh(tmp_path / "killed")
        status = start(None, folder, ["file", count])
        saved = find_state(folder / "state", "recipe")
        assert saved is not None
        module = nn.Linear(3, 2)
        optimizer = optim.SGD(module.parameters(), lr=1.0, momentum=0.9)
        restore(saved, module, optimizer)
        assert all((p == saved.done).all() for p in module.parameters())
        assert all((slot["momentum_buffer"] == -saved.done).all() for slot in optimizer.state.values())
        assert saved.history == {"epochs": [saved.done]}
        found.append(saved.done)
        if status == 0:
            break
        assert killed(status)
        commit(folder / "state", 3)
        assert len(list((folder / "state").iterdir())) == 2, "the next commit clears what the kill left"
    assert status == 0
    assert found == sorted(found)
    assert found.count(1) > 6
    assert found.count(2) > 3


def test_two_ranks_train_one_model(make_recipe: Callable[..., Recipe], start: Start, tmp_path: Path) -> None:
    """As under torchrun: the first rank writes, the metrics are those of the model that it wrote, over all items."""
    recipe = make_recipe(data={"source": "fake:100"}, train={"pretrain_epochs": 1, "epochs": 1})
    folder = fresh(tmp_path / "two")
    assert start(recipe, folder, None, ranks=2) == 0
    metrics = json.loads((folder / "out" / METRICS).read_text())
    validation = load_data(recipe.data, 0).validation
    measured, answers = measure(load_trained(recipe, folder / "out"), validation, batch=64)
    assert measured["items"] == metrics["data"]["validation"] == 20
    recorded, found = flatten({"a": load_record(folder / "out" / VALIDATION)["compressed"]}), flatten({"a": answers})
    assert all(recorded[name].tolist() == found[name].tolist() for name in found), "of both ranks, in order"
    assert measured["accuracy"] == pytest.approx(metrics["compressed"]["accuracy"])
    assert measured["loss"] == pytest.approx(metrics["compressed"]["loss"], rel=1e-5)
    expected = digests(folder)
    assert start(recipe, folder, None, ranks=2) == 0, "all ranks take up the state"
    assert digests(folder) == expected
