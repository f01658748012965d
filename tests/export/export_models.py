"""Small models whose weights are codes x scale already, as if trained: no training, no parametrizations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import nn

from slope_compile.compression.codes import CodedTensor


def convnet() -> nn.Sequential:
    """conv (float), bn, relu, conv (4 bits), bn, relu, grouped conv (3), pool, linear (4), relu, linear (8)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 64, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # γ of both signs: folding one would turn the signs of codes
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


CONVNET_BITS = {"3.weight": 4, "6.weight": 3, "9.weight": 4, "11.weight": 8}


def give_codes(
    model: nn.Module, bits: Mapping[str, int], pattern: tuple[int, int] | None = (2, 4)
) -> dict[str, CodedTensor]:
    """Replace weights by random codes x scale and return the codes; the pattern holds where channels allow it."""
    rng = np.random.default_rng(1)
    codes = {}
    for name, width in bits.items():
        parameter = model.get_parameter(name)
        values = rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), parameter.shape).astype(np.int8)
        holds = pattern is not None and parameter.shape[1] % pattern[1] == 0
        if holds:
            n, m = pattern
            groups = values.reshape(len(values), -1, m, *values.shape[2:])
            groups[:, :, rng.permutation(m)[n:]] = 0
        scale = rng.uniform(0.005, 0.02, len(values)).astype(np.float32)
        codes[name] = CodedTensor(values, scale, width, 0, pattern if holds else None)
        weight = values.astype(np.float32) * scale.reshape(-1, *[1] * (values.ndim - 1))
        parameter.data = torch.from_numpy(weight)
    return codes


def run_onnx(path: Path, x: torch.Tensor) -> np.ndarray:
    """Run an exported file in ONNX Runtime, optimizations off."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], {"input": x.numpy()})[0])


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
