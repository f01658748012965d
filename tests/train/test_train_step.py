from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slope_compile.errors import TrainingError
from slope_compile.events import Events
from slope_compile.recipe import Recipe
from slope_compile.train.engine import make_accelerator
from slope_compile.train.loop import train
from slope_compile.train.tasks import ImageBatch

MakeRecipe = Callable[..., Recipe]
NET = """
from torch import nn

def plain(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16) if BATCH_NORM else nn.GroupNorm(4, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, classes),
    )
"""


def result(
    make_recipe: MakeRecipe, folder: Path, norm: bool = False, **keys: Any
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Epoch records and checkpoint of one FP32 and one compressed epoch."""
    net = folder / f"norm_{norm}.py"
    net.write_text(NET.replace("BATCH_NORM", str(norm)))
    section = {"pretrain_epochs": 1, "epochs": 1, **keys}
    recipe = make_recipe(model={"name": f"{net}:plain"}, train=section)
    out = folder / "-".join(f"{key}-{value}" for key, value in keys.items() or [("plain", "")])
    out.mkdir()
    train(recipe, out, folder / f"{out.name}.state", Events())
    return json.loads((out / "metrics.json").read_text())["epochs"], load_file(out / "checkpoint.safetensors")


def test_a_split_step_is_the_whole_step(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """54 images in two batches of 27: parts of 6, 7 and 7, weighted by their items; the penalty counts once."""
    whole, weights = result(make_recipe, tmp_path)
    split, parts = result(make_recipe, tmp_path, accumulate=4)
    for ours, theirs in zip(split, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["penalty"] == pytest.approx(theirs["penalty"], rel=1e-5)
    assert split[1]["penalty"] > 0
    for name, tensor in weights.items():
        assert torch.allclose(parts[name], tensor, rtol=1e-4, atol=1e-6), name


def test_parts_that_would_be_empty_are_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"leaves 0 image\(s\) at a time for each of 1 process\(es\) and 28 part"):
        result(make_recipe, tmp_path, accumulate=28)


def test_compiled_training_equals_eager(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    eager, weights = result(make_recipe, tmp_path, norm=True, pretrain_epochs=0, epochs=2)
    compiled, found = result(make_recipe, tmp_path, norm=True, pretrain_epochs=0, epochs=2, compile=True)
    for ours, theirs in zip(compiled, eager, strict=True):
        for key in ("loss", "penalty", "validation_loss"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-6), name


def test_a_machine_that_cannot_compile_says_so(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one.")

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(
        TrainingError, match=r"does not work here: RuntimeError: Failed to find C compiler\. .*compile: false"
    ):
        result(make_recipe, tmp_path, compile=True)


def test_what_the_launcher_was_told_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would divide the loss, and choose another precision, by its own settings."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = make_accelerator("fp32")
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"


def test_batches_split_in_order() -> None:
    batch = ImageBatch(torch.arange(7.0).view(7, 1, 1, 1), torch.arange(7))
    parts = batch.split(3)
    assert [len(part) for part in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
