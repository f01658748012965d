"""Models and situations for the placement tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import nn

import slope_compile as sc
from slope_compile.compression.codes import CodedTensor
from slope_compile.placement.apply import placed_model
from slope_compile.placement.choose import Place, choose_places
from slope_compile.placement.layers import Layer, read_layers
from slope_compile.placement.rounding import exact_values
from slope_compile.placement.rules import possible
from slope_compile.placement.situation import Situation
from slope_compile.qdq.reader import coded_weights
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.target import find_target


def situation(
    target: str = "a100", backend: str = "tensorrt", version: str = "", precision: Any = "fp16", batch: int = 1
) -> Situation:
    newest = {"tensorrt": "10.14.1", "tensorrt-rtx": "1.7.1"}[backend]
    return Situation(find_target(target), BACKENDS[backend], version or newest, precision, batch)


SITUATIONS = tuple(
    situation(target, backend, version, precision)
    for target, backend, version in (
        ("a100", "tensorrt", "10.3.0"),
        ("a100", "tensorrt", "11.4.0"),
        ("orin", "tensorrt", "10.3.0"),
        ("rtx-turing", "tensorrt-rtx", "1.7.1"),
        ("a100", "tensorrt-rtx", "1.7.1"),
    )
    for precision in ("fp32", "fp16", "bf16")
    if not (precision == "bf16" and target == "rtx-turing")
)


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def export(model: nn.Module, x: torch.Tensor, path: Path, **settings: Any) -> dict[str, CodedTensor]:
    """Compress as if trained, export, and return the checkpoint's codes."""
    sc.compress(model.eval(), **{"bits": 4, "pattern": "2:4", **settings})
    model.train()
    with torch.no_grad():
        model(x)  # activation quantizers take their first range here
    sc.export(model.eval(), x, path)
    return sc.codes(model)


def everywhere(layers: list[Layer], placement: Any, one: Situation) -> Situation | None:
    """The situation in which every layer that can have a placement is asked to; None where none can."""
    able = {layer.label: placement for layer in layers if placement in possible(layer, one) and layer.bits is not None}
    return replace(one, overrides=able) if able else None


def place(model: Path, one: Situation, folder: Path) -> tuple[Path, list[Place]]:
    weights = coded_weights(model)
    places = choose_places(model, weights, one)
    folder.mkdir(exist_ok=True)
    return placed_model(model, weights, places, one, folder), places


def require_same_weights(placed: Path, codes: Mapping[str, CodedTensor], places: list[Place]) -> None:
    """Codes times scale of the checkpoint, bit for bit, read back from the placed file; padding is zero."""
    found = coded_weights(placed)
    assert {weight.name for weight in found} >= set(codes)
    for weight, chosen in zip(found, places, strict=True):
        if weight.name not in codes:
            continue
        expected = np.asarray(codes[weight.name].dequantize(), np.float32)
        values = exact_values(weight)
        if weight.reduction_axis == 0 and weight.op in ("MatMul", "Gemm"):
            values = values.T
        if values.ndim == 2:
            assert not values[:, expected.shape[1] :].any()
            values = values[:, : expected.shape[1]]
        if weight.dtype in ("FLOAT16", "BFLOAT16"):
            kind = torch.float16 if weight.dtype == "FLOAT16" else torch.bfloat16
            expected = torch.from_numpy(expected.copy()).to(kind).float().numpy()
        elif chosen.placement != "float":
            assert weight.codes is not None
        assert np.array_equal(np.ascontiguousarray(values).view(np.uint32), expected.view(np.uint32)), weight.name


def layers_of(model: Path) -> list[Layer]:
    return read_layers(model, coded_weights(model))


def run(model: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def run_proto(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])
