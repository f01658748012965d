"""`slope_compile.export` on models compressed by `slope_compile.compress`, parametrizations in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from export_models import convnet, relative_error, run_onnx
from torch import nn

import slope_compile
from slope_compile.codes_file import save_codes
from slope_compile.compression.api import codes, compress
from slope_compile.errors import ModelError
from slope_compile.events import Events
from slope_compile.export.run import export, export_run
from slope_compile.qdq.reader import coded_weights
from slope_compile.recipe import recipe_from


def test_a_vision_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, depth=1, num_classes=6).eval()
    compress(model, bits=4, pattern="2:4", granularity="channel")
    x = torch.randn(3, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = export(model, x, tmp_path / "vit.onnx")["layers"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    placed = {row["name"]: (row["op"], row["placement"]) for row in layers}
    assert placed["blocks.0.mlp.fc1.weight"] == ("MatMul", "int4-weight")
    assert placed["head.weight"] == ("Gemm", "int8-weight")
    trained = codes(model)
    stored = {w.name: w for w in coded_weights(tmp_path / "vit.onnx") if w.codes is not None}
    assert stored.keys() == trained.keys()
    for name, coded in trained.items():
        assert np.array_equal(stored[name].values(), model.get_submodule(name[:-7]).weight.detach().numpy())
        assert np.array_equal(stored[name].codes, coded.codes)
    with torch.no_grad():
        assert relative_error(run_onnx(tmp_path / "vit.onnx", x), model(x).numpy()) < 1e-5


def test_export_is_the_packages_own_function() -> None:
    with pytest.raises(ModelError, match="Opset 20"):
        slope_compile.export(nn.Linear(2, 2), torch.ones(1, 2), "m.onnx", opset=20)


@pytest.mark.parametrize("example", [torch.ones(3), torch.ones(0, 2), torch.ones(1, 2, dtype=torch.int64), [1.0, 2.0]])
def test_an_example_that_is_no_batch_is_refused(example: object, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"not a float tensor \[samples, \.\.\.\]"):
        export(nn.Linear(2, 2), example, tmp_path / "m.onnx")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), nn.Flatten())
    compress(model, bits=4, pattern="2:4")
    (tmp_path / "m.onnx").write_bytes(b"old")
    with torch.no_grad():
        model[0].bias.fill_(torch.nan)
    with pytest.raises(ModelError, match="NaN"):
        export(model, torch.ones(2, 4, 3, 3), tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_a_run_is_exported_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = convnet()
    compress(model, bits=4, pattern="2:4")
    trained, out = tmp_path / "train", tmp_path / "export"
    trained.mkdir()
    out.mkdir()
    save_codes(trained / "codes.safetensors", codes(model))
    monkeypatch.setattr("slope_compile.train.trained.load_trained", lambda recipe, folder: model)
    raw = {
        "model": {"name": "torchvision/resnet18"},
        "data": {"source": "fake:40", "size": 12},
        "export": {"samples": 3},
    }
    export_run(recipe_from(raw, "test"), trained, out, Events())
    assert sorted(file.name for file in out.iterdir()) == ["golden.safetensors", "layers.json", "model.onnx"]
    (tensor,) = (w for w in coded_weights(out / "model.onnx") if w.name == "3.weight")
    assert np.array_equal(tensor.codes, codes(model)["3.weight"].codes)
