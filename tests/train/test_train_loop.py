from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from train_files import NET, recipe_of

from slope_compile.codes_file import load_codes
from slope_compile.errors import ArtifactError, DataError, ModelError, RecipeError, StorageError, TrainingError
from slope_compile.events import Events
from slope_compile.recipe import Recipe
from slope_compile.train.data import load_data
from slope_compile.train.engine import deterministic
from slope_compile.train.loop import train
from slope_compile.train.trained import evaluate, load_trained

MakeRecipe = Callable[..., Recipe]


class Run:
    """One training: its folders, its events, its metrics."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.out, self.state = recipe, folder / "out", folder / "state"
        self.events: list[dict[str, Any]] = []
        self.out.mkdir(parents=True, exist_ok=True)
        train(recipe, self.out, self.state, Events(listeners=[self.events.append]))
        self.metrics = json.loads((self.out / "metrics.json").read_text())

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run that tests look at and leave alone."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "net.py").write_text(NET)
    return Run(recipe_of(folder / "net.py"), folder)


def test_what_is_written_agrees_with_itself(run: Run) -> None:
    """Codes times scale are the weights of the loaded model, bit for bit, and its measured accuracy is the one told."""
    model = load_trained(run.recipe, run.out)
    assert not model.training
    stored = load_codes(run.out / "codes.safetensors")
    assert sorted(stored) == ["0.weight", "3.weight", "9.weight"]
    for name, coded in stored.items():
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert np.array_equal(np.asarray(coded.dequantize()), weight.detach().numpy())
    groups = stored["3.weight"].codes.reshape(16, 2, 4, 3, 3)
    assert ((groups != 0).sum(axis=2) <= 2).all()

    data = load_data(run.recipe.data, seed=123)
    measured = evaluate(model, data.validation, batch=4)
    assert measured["items"] == len(data.validation) == run.metrics["data"]["validation"]
    assert measured["accuracy"] == run.metrics["compressed"]["accuracy"]
    assert measured["loss"] == pytest.approx(run.metrics["compressed"]["loss"], rel=1e-5)
    # The directions, counted by hand.
    direction, counts = run.metrics["direction"], [0] * 200
    for layer in (model[0], model[3], model[9]):
        latents = layer.parametrizations.weight.original.detach().double().flatten(1).numpy()
        for w, w_hat in zip(latents, layer.weight.detach().double().flatten(1).numpy(), strict=True):
            cosine = float(w @ w_hat / np.linalg.norm(w) / np.linalg.norm(w_hat))
            counts[min(int(cosine * 200), 199)] += 1
    assert direction["after"] == counts and direction["zero"] == {"before": 0, "after": 0}
    assert sum(direction["before"]) == sum(counts) and direction["before"] != counts
    assert direction["edges"] == [index / 200 for index in range(201)]

    # The accuracy, counted by hand.
    images = torch.stack([data.validation[i][0] for i in range(len(data.validation))])
    right = (model(images).argmax(1) == torch.tensor(data.validation.labels)).float().mean()
    assert measured["accuracy"] == pytest.approx(float(right))


def test_metrics_tell_every_epoch(run: Run) -> None:
    metrics = run.metrics
    epochs = metrics["epochs"]
    assert [(e["phase"], e["epoch"]) for e in epochs] == [("fp32", 1), ("fp32", 2), ("slope", 1), ("slope", 2)]
    assert metrics["fp32"] == {"accuracy": epochs[1]["accuracy"], "loss": epochs[1]["validation_loss"]}
    assert metrics["compressed"] == {"accuracy": epochs[3]["accuracy"], "loss": epochs[3]["validation_loss"]}
    assert all(e["layers"] == {} and e["penalty"] == 0 for e in epochs[:2])
    for epoch in epochs[2:]:
        assert sorted(epoch["layers"]) == ["0", "3", "9"]
        assert epoch["penalty"] > 0
        middle = epoch["layers"]["3"]
        assert 0.5 < middle["cosine"] < 1
        assert 0 < middle["density"] <= 0.5
        assert 0 <= middle["flip_rate"] < 0.5
        assert middle["step"] > 0
        assert middle["sqnr_db"] > 0
        assert epoch["layers"]["0"]["flip_rate"] is None  # dense: no mask
    assert metrics["layers"] == epochs[3]["layers"]
    assert [row["name"] for row in metrics["plan"]] == ["0", "3", "9"]
    assert metrics["plan"][1]["bits"] == 4
    assert metrics["classes"] == [f"class{k}" for k in range(10)]
    assert metrics["data"] == {"train": 54, "validation": 10}


def test_events_count_steps_over_both_phases(run: Run) -> None:
    progress = [(e["done"], e["total"]) for e in run.of("progress")]
    assert progress == [(k + 1, 8) for k in range(8)]
    assert [e["phase"] for e in run.of("metric")] == ["fp32", "fp32", "slope", "slope"]
    assert run.of("metric")[3]["accuracy"] == run.metrics["compressed"]["accuracy"]


def test_flip_rate_counts_changed_places(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Of one epoch: the mask it started with is the FP32 weights', the one it ended with the checkpoint's."""
    run = Run(make_recipe(train={"pretrain_epochs": 1, "epochs": 1, "lr": 0.2}), tmp_path / "one")
    latent = load_file(run.out / "checkpoint.safetensors")["3.parametrizations.weight.original"]
    fp32 = Run(
        make_recipe(train={"pretrain_epochs": 1, "epochs": 1, "lr": 1e-12, "pretrain_lr": 0.2}), tmp_path / "two"
    )
    before = load_file(fp32.out / "checkpoint.safetensors")["3.parametrizations.weight.original"]
    flips = (mask_24(before) != mask_24(latent)).float().mean()
    assert flips > 0
    assert run.metrics["layers"]["3"]["flip_rate"] == pytest.approx(float(flips))


def mask_24(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.abs().unflatten(1, (-1, 4))
    return (groups >= groups.sort(dim=2).values[:, :, 2:3]).flatten(1, 2)


def test_it_learns(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    train_section = {"pretrain_epochs": 6, "epochs": 2, "lr": 0.1, "label_smoothing": 0.1}
    recipe = make_recipe(data={"source": "fake:300", "augment": "none"}, train=train_section)
    metrics = Run(recipe, tmp_path).metrics
    assert metrics["fp32"]["accuracy"] > 0.6
    assert metrics["compressed"]["accuracy"] > 0.6
    assert metrics["epochs"][-1]["loss"] < metrics["epochs"][0]["loss"]


def test_without_pretraining_the_model_is_measured_as_it_came(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    metrics = Run(make_recipe(train={"pretrain_epochs": 0, "epochs": 1}), tmp_path).metrics
    assert [e["phase"] for e in metrics["epochs"]] == ["slope"]
    assert 2 < metrics["fp32"]["loss"] < 3  # near log(10): nothing learnt


def test_the_seed_decides_and_workers_do_not(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def weights(name: str, **sections: dict[str, Any]) -> bytes:
        run = Run(make_recipe(**sections), tmp_path / name)
        return (run.out / "checkpoint.safetensors").read_bytes()

    short = {"pretrain_epochs": 1, "epochs": 1}
    first = weights("a", train=short)
    assert weights("b", train=short, data={"workers": 2}) == first
    assert weights("c", train={**short, "seed": 1}) != first


def test_bf16_is_measured_in_float32(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = Run(make_recipe(train={"precision": "bf16", "pretrain_epochs": 1, "epochs": 1}), tmp_path)
    measured = evaluate(load_trained(run.recipe, run.out), load_data(run.recipe.data, 0).validation, batch=32)
    assert measured["loss"] == pytest.approx(run.metrics["compressed"]["loss"], rel=1e-5)


def test_fp16_without_a_gpu_says_so(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TrainingError, match="fp16, and there is no GPU"):
        Run(make_recipe(train={"precision": "fp16"}), tmp_path)


@pytest.mark.parametrize("phase", ["fp32", "slope"])
def test_divergence_stops_and_keeps_the_last_good_state(make_recipe: MakeRecipe, tmp_path: Path, phase: str) -> None:
    lr = {"fp32": {"lr": 1e30}, "slope": {"lr": 1e30, "pretrain_lr": 0.05}}[phase]
    recipe = make_recipe(train={**lr, "warmup_epochs": 0})
    with pytest.raises(TrainingError) as error:
        Run(recipe, tmp_path)
    said = str(error.value)
    assert f"({phase})" in said
    assert "step 2 of 2" in said
    assert "learning rate 8.54e+29" in said  # a quarter down the cosine: 1e30 * (1 + cos(pi/4)) / 2
    assert "train.lr" in said
    if phase == "slope":
        assert f"The state after epoch 2 is kept in {tmp_path / 'state'}" in said
        assert json.loads((tmp_path / "state" / "state.json").read_text())["done"] == 2
    else:
        assert "No epoch had finished" in said
        assert not (tmp_path / "state").exists()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_state_of_another_recipe_is_refused_before_anything_is_read(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    Run(make_recipe(train={"pretrain_epochs": 1, "epochs": 1}), tmp_path)
    with pytest.raises(ArtifactError, match="another recipe"):
        Run(make_recipe(train={"pretrain_epochs": 1, "epochs": 2}), tmp_path)


@pytest.mark.parametrize(
    ("sections", "kind", "said"),
    [
        ({"model": {"classes": 7}, "data": {"source": "digits"}}, DataError, "model.classes is 7, but digits has 10"),
        ({"data": {"batch": 1}}, TrainingError, "too few for batch norm"),
        ({"compression": {"overrides": {"layer9": "off"}}}, RecipeError, "layer9"),
        ({"compression": {"first_last_bits": None, "overrides": {"*": "off"}}}, ModelError, "can be compressed"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    make_recipe: MakeRecipe, tmp_path: Path, sections: dict[str, Any], kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        Run(make_recipe(**sections), tmp_path)
    assert not (tmp_path / "state").exists()


def test_skipped_images_are_told_and_counted(make_recipe: MakeRecipe, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "ant" / "3.png").write_bytes(b"broken")
    data = {"source": f"imagefolder:{image_folder}", "bad_images": "skip", "validation": 0.4, "batch": 4}
    run = Run(make_recipe(data=data, train={"pretrain_epochs": 1, "epochs": 1}), tmp_path)
    warned = [event["text"] for event in run.of("warning")]
    assert any("3.png" in text for text in warned)
    assert any(text.startswith("1 item") for text in warned)
    assert sum(run.metrics["data"].values()) == 9
    assert run.metrics["classes"] == ["ant", "bee"]
    assert load_trained(run.recipe, run.out)(torch.zeros(1, 3, 8, 8)).shape == (1, 2)  # classes from the metrics


def test_outputs_that_cannot_be_written_are_a_storage_error(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(train={"pretrain_epochs": 0, "epochs": 1})
    with pytest.raises(StorageError, match="nowhere"):
        train(recipe, tmp_path / "nowhere", tmp_path / "state", Events())


def test_a_timm_model_trains(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model = {"name": "timm/test_vit"}
    recipe = make_recipe(
        model=model, data={"size": 32}, train={"pretrain_epochs": 0, "epochs": 1, "optimizer": "adamw"}
    )
    run = Run(recipe, tmp_path)
    assert any(row["pattern"] == "2:4" for row in run.metrics["plan"])


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_checkpoint_is_named(run: Run, tmp_path: Path, damage: str) -> None:
    shutil.copytree(run.out, tmp_path / "out")
    path = tmp_path / "out" / "checkpoint.safetensors"
    recipe = run.recipe
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        recipe = recipe.model_copy(
            update={"compression": recipe.compression.model_copy(update={"first_last_bits": None})}
        )
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors"):
        load_trained(recipe, path.parent)


def test_torch_is_left_as_it_was() -> None:
    enabled, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings(), deterministic():
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == enabled
    assert torch.utils.deterministic.fill_uninitialized_memory == fill
