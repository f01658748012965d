"""The ImageNet recipes, each taken through one step on made-up images of 32 pixels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slope_compile.events import Events
from slope_compile.recipe import load_recipe
from slope_compile.train.loop import train

pytestmark = pytest.mark.e2e
SMALL = ["data.source=fake:20", "data.size=32", "data.workers=0", "train.epochs=1", "model.weights=null"]
MIDDLE = {
    "imagenet-resnet18": "layer2.0.conv1",
    "imagenet-resnet50": "layer2.0.conv1",
    "imagenet-deit-small": "blocks.3.attn.qkv",
}


@pytest.mark.parametrize("name", MIDDLE)
def test_an_imagenet_recipe_takes_a_step(name: str, tmp_path: Path) -> None:
    whole = load_recipe(name)
    assert whole.data.source == "imagefolder:imagenet"
    assert whole.data.size == 224
    recipe, told = load_recipe(name, SMALL), []
    (tmp_path / "out").mkdir()
    train(recipe, tmp_path / "out", tmp_path / "state", Events(listeners=[told.append]))
    assert [event["total"] for event in told if event["kind"] == "progress"] == [1]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    plan = {row["name"]: (row["bits"], row["pattern"]) for row in metrics["plan"]}
    first, *_, last = plan.values()
    assert first == last == (8, None)
    assert plan[MIDDLE[name]] == (4, "2:4")
    assert metrics["layers"][MIDDLE[name]]["density"] <= 0.5
