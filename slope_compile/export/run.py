"""The export stage of a run, and `slope_compile.export` for models of one's own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope_compile.codes_file import load_codes
from slope_compile.compression.api import codes as codes_of
from slope_compile.errors import DataError, ModelError
from slope_compile.events import Events
from slope_compile.export.model import Files, export_model
from slope_compile.recipe import Recipe

DEFAULT_OPSET = 21  # the first with INT4 DequantizeLinear, and the one most TensorRT releases parse


def export_run(recipe: Recipe, trained: Path, out: Path, events: Events) -> None:
    """Export a trained run: model.onnx, golden.safetensors and layers.json into an empty folder.

    Args:
        recipe: The run's recipe.
        trained: The train stage's folder.
        out: The folder to fill.
        events: Told of each step.

    Raises:
        ModelError: If the model cannot be exported.
        CheckFailedError: If the bytes on disk do not hold what was trained.
    """
    from slope_compile.train.data import load_data
    from slope_compile.train.trained import load_trained

    model = load_trained(recipe, trained)
    validation = load_data(recipe.data, recipe.train.seed, recipe.model.classes).validation
    samples = min(recipe.export.samples, len(validation))
    if not samples:
        raise DataError(f"{recipe.data.source} has no validation images.", "Golden outputs need at least one.")
    inputs = torch.stack([validation[index][0] for index in range(samples)])
    codes = load_codes(trained / "codes.safetensors")
    export_model(model, codes, inputs, Files.inside(out), recipe.export.opset, events)


def export(model: nn.Module, example: torch.Tensor, path: str | Path, opset: int = DEFAULT_OPSET) -> dict[str, Any]:
    """Write a compressed model to an ONNX file, with its golden inputs and outputs and its layer list beside it.

    `m.onnx` comes with `m.golden.safetensors` and `m.layers.json`. The model is left as it is.

    Args:
        model: A model that `slope_compile.compress` compressed.
        example: Inputs, float32 [samples, ...]; also the golden inputs. The exported batch is dynamic.
        path: The file to write.
        opset: ONNX operator set, 21 or later.

    Returns:
        One row a layer: placement, reason, bits, pattern, bytes, density.

    Raises:
        ModelError: If the model is not compressed or cannot be exported, or the example is no batch of inputs.
        CheckFailedError: If the bytes on disk do not hold the model's codes.
    """
    if opset < DEFAULT_OPSET:
        raise ModelError(f"Opset {opset} has no INT4 DequantizeLinear.", f"Use opset {DEFAULT_OPSET} or later.")
    if not isinstance(example, torch.Tensor) or not example.is_floating_point() or example.ndim < 2 or not len(example):
        kind = list(example.shape) if isinstance(example, torch.Tensor) else type(example).__name__
        raise ModelError(f"The example is {kind}, not a float tensor [samples, ...].", "Give a batch of inputs.")
    target = Path(path)
    # Beside the target and moved when proved, the model last: a failed export leaves what was there.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        files = Files.beside(Path(folder) / target.name)
        layers = export_model(model, codes_of(model), example, files, opset, Events())
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == files.model):
            file.replace(target.parent / file.name)
    return layers
