"""A small run, made without training or torch; its bundle; and that bundle on a 'device'."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from bundle_files import codes_of, recipe
from prepared_runs import write_list
from safetensors.numpy import save_file

from slope_compile.artifacts import RunFolder
from slope_compile.bundle.make import bundle_run
from slope_compile.codes_file import save_codes
from slope_compile.events import Events


@pytest.fixture(scope="session")
def run(net: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    train, export = folder.fresh_partial("train"), folder.fresh_partial("export")
    shutil.copy(net(), export / "model.onnx")
    save_codes(train / "codes.safetensors", codes_of(export / "model.onnx"))
    figures = {"metric": "accuracy", "fp32": {"accuracy": 0.9}, "compressed": {"accuracy": 0.8}}
    (train / "metrics.json").write_text(json.dumps(figures))
    x = np.random.default_rng(0).normal(size=(6, 4, 6, 6)).astype(np.float32)
    (y,) = ort.InferenceSession(export / "model.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})
    save_file({"inputs": x, "outputs": y}, export / "golden.safetensors")
    write_list(export / "layers.json", export / "model.onnx", codes_of(export / "model.onnx"))
    for stage in ("train", "export"):
        folder.commit(stage, {}, {})
    (folder.path / "recipe.yaml").write_text(recipe().to_yaml())
    return folder


@pytest.fixture(scope="session")
def archive(run: RunFolder) -> Path:
    return bundle_run(run, recipe(), "a100", Events())[0]


@pytest.fixture
def carried(archive: Path, tmp_path: Path) -> Path:
    """The archive in a folder of its own, as on a device."""
    return Path(shutil.copy(archive, tmp_path))
