"""A small network with all that a search meets, exported for real, then damaged: norms, a residual sum, tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn

import slope_compile as sc
from slope_compile.compression.api import compress, fold
from slope_compile.export.float_graph import frozen_copy
from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.bisect import Divergence, OnnxSide, TorchSide, explain
from slope_compile.verify.parity.tolerance import Tolerance, tolerance_of

torch.set_num_threads(1)
Edit = Callable[[onnx.ModelProto], None]
SAMPLES, CHANNELS, SIDE = 3, 3, 8
LAYERS = ["conv1", "conv2", "proj", "wide", "head"]


class Net(nn.Module):
    """conv, norm, relu; conv, norm, residual sum, relu in place; tokens: norm, linear, gelu, linear; mean, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(CHANNELS, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.norm = nn.LayerNorm(16)
        self.proj, self.wide, self.head = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        tokens = self.wide(nn.functional.gelu(self.proj(tokens)))
        answer: Tensor = self.head(tokens.mean(1))
        return answer


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


@dataclass(frozen=True)
class Exported:
    """A trained model, the same folded, its ONNX file, and inputs."""

    model: nn.Module
    folded: nn.Module
    path: Path
    feed: dict[str, Any]

    @property
    def allowed(self) -> Tolerance:
        return tolerance_of(coded_weights(self.path))

    def damaged(self, folder: Path, edit: Edit) -> Path:
        model = onnx.load(self.path)
        edit(model)
        path = folder / "damaged.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    def explain(self, folder: Path, edit: Edit, out: Path | None = None) -> Divergence | None:
        """Damage the file and say where it departs from the folded model."""
        tested = OnnxSide(self.damaged(folder, edit))
        return explain("parity.onnx", TorchSide(self.folded), tested, self.feed, self.allowed, out)

    def between_files(self, folder: Path, edit: Edit, out: Path | None = None) -> Divergence | None:
        """Damage a copy of the file and say where it departs from the file."""
        tested = OnnxSide(self.damaged(folder, edit))
        return explain("parity.placed", OnnxSide(self.path), tested, self.feed, self.allowed, out)


def export_net(folder: Path, **options: Any) -> Exported:
    net = make_net()
    compress(net, first_last_bits=4, granularity="channel", **options)
    if "activation_bits" in options:
        for _ in range(3):
            net(torch.randn(8, CHANNELS, SIDE, SIDE))
    sc.export(net.eval(), torch.randn(2, CHANNELS, SIDE, SIDE), folder / "net.onnx")
    folded = frozen_copy(net)
    fold(folded)
    feed = {"input": np.random.default_rng(0).standard_normal((SAMPLES, CHANNELS, SIDE, SIDE), dtype=np.float32)}
    return Exported(net, folded, folder / "net.onnx", feed)


def tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


def change(name: str, of: Callable[[Any], Any]) -> Edit:
    """Replace an initializer by a function of its numbers, in its own type."""

    def edit(model: onnx.ModelProto) -> None:
        stored = tensor(model, name)
        array = numpy_helper.to_array(stored)
        wide = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        made = np.ascontiguousarray(of(wide.copy())).astype(array.dtype)
        stored.CopyFrom(numpy_helper.from_array(made, name))

    return edit


def producer(model: onnx.ModelProto, value: str) -> NodeProto:
    return next(node for node in model.graph.node if value in node.output)


def consumer(model: onnx.ModelProto, value: str) -> NodeProto:
    return next(node for node in model.graph.node if value in node.input)
