from __future__ import annotations

import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slope_compile.errors import ModelError
from slope_compile.events import Events
from slope_compile.recipe import Recipe
from slope_compile.train import weights
from slope_compile.train.loop import Trainer
from slope_compile.train.weights import load_local


def net(classes: int = 10, width: int = 16, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(stem=nn.Conv2d(3, width, 3), norm=nn.BatchNorm2d(width), fc=nn.Linear(width, classes))
    )


def save(value: Any, path: Path, **settings: Any) -> Path:
    torch.save(value, path, **settings)  # noqa: TID251 - what users have
    return path


WRAPPED: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain.pt": lambda state: state,
    "lightning.pt": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "deit.pth": lambda state: {"model": state},
    "nested.pth": lambda state: {"model": {"state_dict": state}, "arch": "net"},
    "parallel.bin": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "compiled.pt": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "half.pt": lambda state: {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_usual_wrappings_are_taken_off(tmp_path: Path, name: str) -> None:
    state, model = net(seed=1).state_dict(), net()
    assert load_local(model, save(WRAPPED[name](state), tmp_path / name), head=10) == []
    for key, tensor in model.state_dict().items():
        expected = state[key].half().float() if name == "half.pt" and tensor.is_floating_point() else state[key]
        assert torch.equal(tensor, expected), key


def test_a_file_of_the_old_format_is_read(tmp_path: Path) -> None:
    path = save(net(seed=1).state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = net()
    load_local(model, path, head=10)
    assert torch.equal(model.state_dict()["fc.weight"], net(seed=1).state_dict()["fc.weight"])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_another_architecture_is_refused_with_the_keys(tmp_path: Path, suffix: str) -> None:
    state = net(width=32).state_dict()
    state["layer1.weight"] = state.pop("norm.weight")
    path = tmp_path / f"w.{suffix}"
    save_file(state, path) if suffix == "safetensors" else save(state, path)
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError) as error:
        load_local(model, path, head=10)
    said = str(error.value)
    assert "missing norm.weight; unexpected layer1.weight" in said
    assert "stem.weight is (32, 3, 3, 3), the model's is (16, 3, 3, 3)" in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "nothing was copied"


def test_a_head_of_other_classes_is_drawn_anew(tmp_path: Path) -> None:
    path, model = save(net(classes=1000, seed=1).state_dict(), tmp_path / "w.pt"), net(classes=7)
    head = model.state_dict()["fc.weight"].clone()
    assert load_local(model, path, head=7) == ["fc.bias", "fc.weight"]
    assert torch.equal(model.state_dict()["fc.weight"], head)
    assert torch.equal(model.state_dict()["stem.weight"], net(seed=1).state_dict()["stem.weight"])


def test_a_new_head_is_told(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    first = Trainer(make_recipe(), tmp_path / "state", Events())
    path = tmp_path / "w.safetensors"
    wide = {
        n: t if not n.startswith("9.") else torch.zeros(20, *t.shape[1:]) for n, t in first.model.state_dict().items()
    }
    save_file(wide, path)
    Trainer(make_recipe(model={"weights": str(path)}), tmp_path / "state", Events(listeners=[told.append]))
    assert [event["text"] for event in told] == [f"{path} was made for other classes: 9.bias, 9.weight start untrained"]


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (Hostile(), "not a PyTorch file of tensors alone"),
        ({"state_dict": Hostile()}, "not a PyTorch file of tensors alone"),
        (net(), "not a PyTorch file of tensors alone"),  # a whole model
        ({"epoch": 3, "best": 0.5}, "epoch, best in it is no tensor"),
        ({}, "it holds dict"),
        ([torch.zeros(3)], "it holds list"),
        ({"w": torch.zeros(3).to_sparse()}, "w in it is no tensor"),
        (b"nothing of the kind", "not a PyTorch file of tensors alone"),
        (b"", "not a PyTorch file of tensors alone"),
        (b"PK\x05\x06" + bytes(18), "not a PyTorch file of tensors alone"),  # an empty archive
    ],
)
def test_what_is_no_state_dict_is_refused_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pt"
    path.write_bytes(contents) if isinstance(contents, bytes) else save(contents, path)
    with pytest.raises(ModelError, match=said) as error:
        load_local(net(), path, head=10)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "MAX_BYTES", 100_000)
    with zipfile.ZipFile(tmp_path / "w.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1_000_000))
    assert (tmp_path / "w.pt").stat().st_size < 10_000
    with pytest.raises(ModelError, match="holds 1000000 bytes, more than 100000"):
        load_local(net(), tmp_path / "w.pt", head=10)
