"""A small model written twice by hand: as ONNX with coded weights, and as its torch twin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from torch import nn

from slope_compile.compression.codes import CodedTensor

torch.set_num_threads(1)  # the models are smaller than what starting a thread costs
CHANNELS, HIDDEN, CLASSES, SIDE, BLOCK = 8, 32, 6, 6, 16


class TwinModel(nn.Module):
    """conv 8->8 3x3 (square), relu, conv 8->32 1x1, mean over positions, linear 32->6."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(CHANNELS, HIDDEN, 1, bias=False)
        self.fc = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv2(torch.relu(self.conv1(x)))
        answer: torch.Tensor = self.fc(x.mean((2, 3)))
        return answer


@dataclass(frozen=True)
class Twin:
    """Codes, the torch model with their values, and how the ONNX file stores them."""

    codes: dict[str, CodedTensor]
    bias: npt.NDArray[np.float32]
    opset: int = 21
    container: str = "INT4"
    half_scales: bool = False  # float16 scales, and a Cast behind DequantizeLinear
    turned_fc: bool = False  # Gemm with transB=0 on the transposed codes, one scale per column

    def model(self) -> TwinModel:
        model = TwinModel().eval()
        with torch.no_grad():
            for name, coded in self.codes.items():
                model.get_parameter(name).copy_(torch.from_numpy(coded.dequantize()))
            model.fc.bias.copy_(torch.from_numpy(self.bias))
        return model

    def proto(self) -> onnx.ModelProto:
        """Scales: conv1 one per channel, conv2 a single one, fc blocks of 16 along the input channel."""
        stored: list[TensorProto] = [numpy_helper.from_array(self.bias, "fc.bias")]
        nodes: list[onnx.NodeProto] = []
        for name, coded in self.codes.items():
            self._add(name, coded, stored, nodes)
        nodes += [
            helper.make_node("Conv", ["input", "conv1.weight"], ["a"], "conv1", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"], "relu"),
            helper.make_node("Conv", ["b", "conv2.weight"], ["c"], "conv2"),
            helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
            helper.make_node("Flatten", ["d"], ["e"], "flatten"),
            helper.make_node(
                "Gemm", ["e", "fc.weight", "fc.bias"], ["output"], "fc", transB=0 if self.turned_fc else 1
            ),
        ]
        graph = helper.make_graph(
            nodes,
            "twin",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", CHANNELS, SIDE, SIDE])],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", CLASSES])],
            stored,
        )
        ir_version = 13 if self.opset >= 25 else 10
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=ir_version)

    def write(self, path: Path, edit: Callable[[onnx.ModelProto], None] | None = None) -> Path:
        model = self.proto()
        if edit is not None:
            edit(model)
        path.write_bytes(model.SerializeToString())
        return path

    def golden(self, path: Path, samples: int = 5) -> Path:
        inputs = np.random.default_rng(1).standard_normal((samples, CHANNELS, SIDE, SIDE), dtype=np.float32)
        with torch.no_grad():
            outputs = self.model()(torch.from_numpy(inputs)).numpy()
        save_file({"inputs": inputs, "outputs": outputs}, path)
        return path

    def _add(self, name: str, coded: CodedTensor, stored: list[TensorProto], nodes: list[onnx.NodeProto]) -> None:
        codes, scale = np.asarray(coded.codes), np.asarray(coded.scale)
        attributes: dict[str, Any] = {"axis": 0}
        if name == "conv2.weight":
            scale = scale[:1].reshape(())
        elif name == "fc.weight" and self.turned_fc:
            codes, attributes = codes.T, {"axis": 1}
        elif name == "fc.weight":
            scale, attributes = np.repeat(scale[:, None], HIDDEN // BLOCK, 1), {"axis": 1, "block_size": BLOCK}
        stored.append(tensor_of(codes, f"{name}.codes", self.container))
        stored.append(numpy_helper.from_array(scale.astype(np.float16) if self.half_scales else scale, f"{name}.scale"))
        value = f"{name}.half" if self.half_scales else name
        inputs = [f"{name}.codes", f"{name}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [value], f"{name}.dq", **attributes))
        if self.half_scales:
            nodes.append(helper.make_node("Cast", [value], [name], f"{name}.cast", to=TensorProto.FLOAT))


def tensor_of(codes: npt.NDArray[Any], name: str, container: str) -> TensorProto:
    kind = {"INT8": np.int8, "INT4": ml_dtypes.int4, "INT2": ml_dtypes.int2}[container]
    return numpy_helper.from_array(np.ascontiguousarray(codes).astype(kind), name)


def make_codes(bits: int = 4, power_of_two_scales: bool = False) -> dict[str, CodedTensor]:
    """Convolutions 2:4 along the input channel, the linear layer dense; the extreme codes occur."""
    rng = np.random.default_rng(0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shapes = {"conv1.weight": (8, 8, 3, 3), "conv2.weight": (32, 8, 1, 1), "fc.weight": (6, 32)}
    found = {}
    for name, shape in shapes.items():
        codes = rng.integers(low, high, shape, endpoint=True).astype(np.int8)
        codes[codes == 0] = 1
        pattern = None
        if name != "fc.weight":
            pattern = (2, 4)
            codes[:, [0, 2, 5, 6]] = 0  # two of channels 0-3, two of channels 4-7
        scale = rng.uniform(0.01, 0.1, shape[0]).astype(np.float32)
        if power_of_two_scales:
            scale = np.exp2(np.round(np.log2(scale))).astype(np.float32)
        if name == "conv2.weight":
            scale[:] = scale[0]
        found[name] = CodedTensor(codes, scale, bits, 0, pattern)
    return found


def initializer(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(one for one in model.graph.node if one.name == name)


def make_twin() -> Twin:
    return Twin(make_codes(), np.linspace(-1, 1, CLASSES, dtype=np.float32))
