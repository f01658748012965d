"""Two processes under torchrun end in the weights of one process with the same global batch, batch norm included."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm

from slope_compile.errors import TrainingError
from slope_compile.events import Events
from slope_compile.recipe import Recipe, recipe_from
from slope_compile.train.batchnorm import _Normalize
from slope_compile.train.engine import refuse_drift
from slope_compile.train.loop import train

# No dropout: each rank draws its own. `Norm` runs a forward pass of its own, as timm's batch norms do.
NET = """
from torch import nn

class Norm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()

def batch(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), Norm(8), nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, classes),
    )

def group(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes),
    )
"""
CASES: dict[str, dict[str, Any]] = {
    "batch-norm": {"net": "batch"},
    "adamw": {"net": "batch", "optimizer": "adamw", "lr": 0.002},
    "parts": {"net": "group", "accumulate": 3},  # on two ranks; the run of one process takes the batch whole
}


def recipe(folder: Path, net: str, compression: dict[str, Any] | None = None, **keys: Any) -> Recipe:
    """81 made-up images: 61 to train on, in batches of 31 and 30, 16 or 15 a rank; or, in three parts, 6 or 5."""
    return recipe_from(
        {
            "compression": compression or {},
            "model": {"name": f"{folder}/net.py:{net}"},
            "data": {"source": "fake:81", "size": 8, "batch": 32, "workers": 0, "validation": 0.2},
            "train": {"pretrain_epochs": 2, "epochs": 2, "lr": 0.05, "precision": "fp32", **keys},
        },
        "test",
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/CASE/1 and FOLDER/CASE/2 for each case; FOLDER/activations/2: with steps of activations, by two processes
    alone; FOLDER/other/2: a state of one process, taken up by two.
    """
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "net.py").write_text(NET)
    orders = []
    for case, keys in CASES.items():
        for ranks in "12":
            (folder / case / ranks / "out").mkdir(parents=True)
        alone = recipe(folder, **{**keys, "accumulate": 1})
        train(alone, folder / case / "1" / "out", folder / case / "1" / "state", Events())
        orders.append((folder / case / "2", recipe(folder, **keys)))
    (folder / "activations" / "2" / "out").mkdir(parents=True)
    orders.append((folder / "activations" / "2", recipe(folder, "batch", {"activation_bits": 4, "bits": 2})))
    (folder / "other" / "2" / "out").mkdir(parents=True)
    shutil.copytree(folder / "batch-norm" / "1" / "state", folder / "other" / "2" / "state")
    orders.append((folder / "other" / "2", recipe(folder, **CASES["batch-norm"])))
    listed = [{"folder": str(path), "recipe": order.model_dump(mode="json")} for path, order in orders]
    (folder / "orders.json").write_text(json.dumps(listed))
    script = Path(__file__).with_name("train_ranks.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(script), str(folder / "orders.json")]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(runs: Path, case: str) -> None:
    one, two = (json.loads((runs / case / ranks / "out" / "metrics.json").read_text()) for ranks in "12")
    for ours, theirs in zip(two["epochs"], one["epochs"], strict=True):
        for key in ("loss", "penalty", "validation_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        assert ours["accuracy"] == theirs["accuracy"]
    left, right = (load_file(runs / case / ranks / "out" / "checkpoint.safetensors") for ranks in "12")
    assert left.keys() == right.keys()
    assert case == "parts" or any("running_var" in name for name in left)
    for name in left:
        assert torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6), name
    left, right = (load_file(runs / case / ranks / "out" / "codes.safetensors") for ranks in "12")
    codes = [name for name in left if left[name].dtype == torch.int8]
    assert codes
    # A weight within float error of the border of two codes may take either.
    assert sum(int((left[n] != right[n]).sum()) for n in codes) <= 0.001 * sum(left[n].numel() for n in codes)


@pytest.mark.e2e
@pytest.mark.parametrize("case", [*CASES, "activations"])
def test_all_ranks_hold_the_same_bytes_after_every_epoch(runs: Path, case: str) -> None:
    first, second = ((runs / case / "2" / f"digests-{rank}").read_text().split() for rank in "01")
    assert first == second
    assert len(set(first)) == 4


@pytest.mark.e2e
def test_another_number_of_processes_cannot_resume(runs: Path) -> None:
    for rank in "01":
        said = (runs / "other" / "2" / f"error-{rank}").read_text()
        assert "the training state of 1 process(es), and this is a run of 2" in said
        assert "Start 1 process(es) to go on, or use --force" in said


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 5), (2, 3, 4, 2)])
def test_batch_norm_over_one_rank_is_torchs_own(group_of_one: None, shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        (torch.randn(s, generator=draw, dtype=torch.double) + 1).requires_grad_() for s in (shape, shape[1], shape[1])
    )
    ours, theirs = ([torch.zeros(shape[1]).double(), torch.ones(shape[1]).double()] for _ in range(2))
    found = _Normalize.apply(x, weight, bias, *ours, 1e-5, 0.3)
    expected = F.batch_norm(x, *theirs, weight, bias, True, 0.3, 1e-5)
    assert torch.allclose(found, expected)
    assert all(torch.allclose(a, b) for a, b in zip(ours, theirs, strict=True))

    def normalized(*inputs: Tensor) -> Any:
        return _Normalize.apply(*inputs, None, None, 1e-5, 0.3)

    assert torch.autograd.gradcheck(normalized, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: normalized(x, None, None), (x,))


def test_torchs_fused_batch_norm_takes_what_it_is_given() -> None:
    """It runs on GPUs only; a torch that changes its arguments shows here."""
    names = ["weight", "bias", "running_mean", "running_var", "eps", "momentum", "process_group", "world_size"]
    assert list(inspect.signature(SyncBatchNorm.forward).parameters)[1:] == ["input", *names]


def test_ranks_that_drift_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes = 2

    def all_gather(values: list[Any], value: Any) -> None:
        values[:] = [value, "another"]

    monkeypatch.setattr(dist, "all_gather_object", all_gather)
    with pytest.raises(TrainingError, match="process 1 differ from those of process 0"):
        refuse_drift(Two(), torch.nn.Linear(1, 1))  # type: ignore[arg-type]
