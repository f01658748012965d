"""What slope-compile exports and places breaks no rule as an error, for TensorRT and for TensorRT-RTX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lint_models import deit, resnet

import slope_compile as sc
from slope_compile.lint.assumed import assumed_situation
from slope_compile.lint.check import lint
from slope_compile.placement.apply import placed_model
from slope_compile.placement.choose import choose_places
from slope_compile.qdq.reader import coded_weights
from slope_compile.recipe import BuildSection


@pytest.mark.parametrize(
    ("make", "options", "allowed"),
    [
        (resnet, {"bits": 4}, set()),
        (resnet, {"bits": 2, "activation_bits": 8, "quantize_outputs": True}, {"sparse-float-output"}),
        (deit, {"bits": 4, "activation_bits": 8}, {"sparse-float-output"}),
    ],
    ids=["resnet-w4", "resnet-w2a8", "deit-w4a8"],
)
def test_our_exports(tmp_path: Path, make: Any, options: dict[str, Any], allowed: set[str]) -> None:
    model, image = make(), torch.randn(2, 3, 32, 32)
    sc.compress(model, pattern="2:4", **options)
    if "activation_bits" in options:
        model.train()
        model(image)
        model.eval()
    path = tmp_path / "model.onnx"
    sc.export(model, image, path)
    for backend in ("tensorrt", "tensorrt-rtx"):
        situation = assumed_situation(path, BuildSection(), "a100", backend)
        assert [v for v in lint(path, situation) if v.level == "error"] == []
        weights = coded_weights(path)
        placed = placed_model(path, weights, choose_places(path, weights, situation), situation, tmp_path)
        found = lint(placed, situation)
        assert {v.rule for v in found} <= allowed, found
        assert all(v.level == "warning" for v in found)


def test_it_needs_neither_torch_nor_a_runtime() -> None:
    modules = "{'torch', 'onnx_ir', 'onnxruntime', 'tensorrt'}"
    code = f"import slope_compile.lint.check, sys; print({modules} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
