from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from train_files import commit

from slope_compile.errors import ArtifactError, StorageError
from slope_compile.recipe import TrainSection
from slope_compile.train.checkpoint import _seal, find_state, portable, restore, save_state
from slope_compile.train.optimizer import make_optimizer


@pytest.fixture
def state(tmp_path: Path) -> Path:
    commit(tmp_path / "state", 1)
    return tmp_path / "state"


def test_no_state_is_none(tmp_path: Path) -> None:
    assert find_state(tmp_path / "state", "recipe") is None


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_an_optimizer_goes_on_as_if_nothing_had_happened(tmp_path: Path, name: str) -> None:
    section = TrainSection(optimizer=name)  # type: ignore[arg-type]

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.arange(16.0).view(2, 2, 2, 2)).square().sum().backward()
        optimizer.step()

    torch.manual_seed(0)
    module = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(module, section)
    step(module, optimizer)
    save_state(tmp_path / "state", "recipe", 1, module, optimizer, {}, {"scale": 2.0})
    step(module, optimizer)

    saved = find_state(tmp_path / "state", "recipe")
    assert saved is not None
    assert saved.scaler == {"scale": 2.0}
    other = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    resumed = make_optimizer(other, section)
    restore(saved, other, resumed)
    step(other, resumed)
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_tensors_are_named(state: Path, damage: str) -> None:
    path = state / "epoch-000001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(ArtifactError, match=r"epoch-000001\.safetensors.*Delete the folder"):
        find_state(state, "recipe")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', "[" * 100_000])
def test_a_damaged_document_is_named(state: Path, text: str) -> None:
    (state / "state.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"state\.json is not a training state of ours"):
        find_state(state, "recipe")


def test_a_document_cannot_point_outside(state: Path) -> None:
    document = json.loads((state / "state.json").read_text())
    (state / "epoch-000001.safetensors").rename(state.parent / "elsewhere.safetensors")
    del document["seal"]
    document["file"] = "../elsewhere.safetensors"
    (state / "state.json").write_text(json.dumps({**document, "seal": _seal(document)}))
    with pytest.raises(ArtifactError, match=r"state/elsewhere\.safetensors cannot be read"):
        find_state(state, "recipe")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("done", 7),
        ("done", "x"),
        ("history", {"epochs": 5}),
        ("history", []),
        ("scaler", 3),
        ("ranks", None),
        ("file", 1),
        ("seal", "0" * 64),
    ],
)
def test_an_edited_document_is_named(state: Path, key: str, value: object) -> None:
    document = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises(ArtifactError, match=r"state\.json is not a training state of ours: it was edited"):
        find_state(state, "recipe")


def test_a_state_of_another_number_of_processes_is_refused(state: Path) -> None:
    with pytest.raises(ArtifactError, match=r"of 1 process\(es\), and this is a run of 8.*Start 1 process\(es\)"):
        find_state(state, "recipe", ranks=8)


def test_a_state_of_another_recipe_is_refused(state: Path) -> None:
    with pytest.raises(ArtifactError, match=r"another recipe.*--out, or --force"):
        find_state(state, "other")


def test_a_state_of_another_model_is_refused(state: Path) -> None:
    saved = find_state(state, "recipe")
    assert saved is not None
    with pytest.raises(ArtifactError, match=r"missing other\.weight"):
        restore(saved, nn.ModuleDict({"other": nn.Linear(3, 2, bias=False)}), None)


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 300])  # the tensors do not fit, not even the header; the document does not
def test_a_full_disk_keeps_the_old_state(state: Path, size: int) -> None:
    before = {path.name: path.read_bytes() for path in state.iterdir()}
    with pytest.raises(StorageError) as error, disk_of(size):
        commit(state, 2)
    assert str(state) in str(error.value)
    assert "MiB free" in str(error.value)
    saved = find_state(state, "recipe")
    assert saved is not None
    assert saved.done == 1
    assert all((state / name).read_bytes() == data for name, data in before.items())


def test_equal_tensors_give_equal_bytes(tmp_path: Path) -> None:
    tensor = torch.arange(120.0).view(2, 3, 4, 5)
    shared = {"b": tensor, "a": tensor, "c": tensor.to(memory_format=torch.channels_last)}
    save_file(portable(shared), tmp_path / "1")
    save_file(portable(dict(reversed(shared.items()))), tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
