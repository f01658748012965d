"""Q/DQ of our own exports stand where TensorRT's rules want them: no one missing, no one too many.

The rules are NVIDIA's Q/DQ layer-placement recommendations, checked on the written graph and not on what chose the
places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from slope_compile.compression.api import codes, compress
from slope_compile.export.run import export
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.verify.model import verify_model

MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")
COMMUTES = (*MOVES, "MaxPool", "Concat")  # integers may go through


class ConvNorm(nn.Sequential):
    def __init__(self, inside: int, out: int, kernel: int = 1, *behind: nn.Module, groups: int = 1) -> None:
        conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False, groups=groups)
        super().__init__(conv, nn.BatchNorm2d(out), *behind)


class Functional(nn.Module):
    """As torchvision's Inception writes it: the activation is a function."""

    def __init__(self, inside: int, out: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Bottleneck(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.one, self.two = ConvNorm(inside, 8, 1, nn.ReLU()), ConvNorm(8, 8, 3, nn.ReLU())
        self.three, self.relu = ConvNorm(8, out), nn.ReLU()
        self.down = ConvNorm(inside, out) if inside != out else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        return self.relu(self.three(self.two(self.one(x))) + shortcut)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Functional(16, 8), nn.Sequential(Functional(16, 8), Functional(8, 8, 3))
        self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), Functional(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x), self.c(x)], 1)


class Dense(nn.Module):
    """As DenseNet: the norm stands before the convolution, so what is concatenated is read in float."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu, self.conv = nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 3, padding=1, bias=False)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv(self.relu(self.norm(x)))], 1)
        return self.pool(self.conv2(self.relu2(self.norm2(x))))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand, self.project = ConvNorm(16, 16, 3, nn.Hardswish(), groups=16), ConvNorm(16, 16)
        self.squeeze, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)
        inner = inner * self.gate(self.fc2(self.relu(self.fc1(self.squeeze(inner)))))
        return x + self.project(inner)


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(self.act(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1)))))
        return x + inner.permute(0, 3, 1, 2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.max = ConvNorm(3, 16, 3, nn.ReLU()), nn.MaxPool2d(2)
        self.same, self.wide = Bottleneck(16, 16), Bottleneck(16, 16)
        self.wide.down = ConvNorm(16, 16)
        self.inception, self.dense = Inception(), Dense()
        self.mobile, self.next = SqueezeExcite(), ConvNeXt()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(self.same(self.max(self.stem(x))))
        x = self.next(self.mobile(self.dense(self.inception(x))))
        return self.fc(torch.flatten(self.pool(x), 1))


@dataclass
class Graph:
    """Who makes and who reads the values of an ONNX graph."""

    model: onnx.ModelProto

    def __post_init__(self) -> None:
        self.nodes = list(self.model.graph.node)
        self.made = {name: node for node in self.nodes for name in node.output}
        self.constants = {tensor.name: tensor for tensor in self.model.graph.initializer}

    def behind(self, name: str, through: tuple[str, ...]) -> Iterator[NodeProto]:
        """What makes a value, seen through some operators."""
        node = self.made.get(name)
        if node is not None and node.op_type in through:
            for one in node.input if node.op_type == "Concat" else node.input[:1]:
                yield from self.behind(one, through)
        elif node is not None:
            yield node

    def reads_int8(self, name: str) -> bool:
        return [node.op_type for node in self.behind(name, MOVES)] == ["DequantizeLinear"]

    def is_convs(self, name: str) -> bool:
        """A convolution's, with nothing but its norm behind it."""
        return [node.op_type for node in self.behind(name, ("BatchNormalization",))] == ["Conv"]

    def violations(self) -> Iterator[str]:
        for node in self.nodes:
            rule = getattr(self, f"of_{node.op_type.lower()}", None)
            for problem in rule(node) if rule else ():
                yield f"{node.op_type} {node.name}: {problem}"

    def of_conv(self, node: NodeProto) -> Iterator[str]:
        if not all(self.reads_int8(name) for name in node.input[:2]):
            yield "a factor is not quantized"

    of_gemm = of_conv

    def of_matmul(self, node: NodeProto) -> Iterator[str]:
        if self.reads_int8(node.input[0]) != self.reads_int8(node.input[1]):
            yield "one factor is quantized and one is not"

    def of_add(self, node: NodeProto) -> Iterator[str]:
        one_is_convs = any(self.is_convs(name) for name in node.input)
        if one_is_convs and sum(self.reads_int8(name) for name in node.input) != 1:
            yield "its residual operand is not quantized"

    def of_concat(self, node: NodeProto) -> Iterator[str]:
        if any(name in self.constants or self.made[name].op_type in ("Shape", "Slice") for name in node.input):
            return  # of shapes
        made = [one for name in node.input for one in self.behind(name, COMMUTES)]
        steps = {one.input[1] if one.op_type == "DequantizeLinear" else None for one in made}
        if len(steps) > 1:
            yield f"operands have several steps: {steps}"

    def of_dequantizelinear(self, node: NodeProto) -> Iterator[str]:
        if node.input[0] in self.constants:
            return
        quantize = self.made[node.input[0]]
        fused = self.made.get(quantize.input[0])
        for reader in (one for one in self.nodes if node.output[0] in one.input):
            if fused is not None and (fused.op_type, reader.op_type) in (
                ("Conv", "BatchNormalization"), ("Conv", "Relu"), ("BatchNormalization", "Relu"),
            ):  # fmt: skip
                yield f"stands between {fused.op_type} and {reader.op_type}"
        if not any(node.output[0] in one.input for one in self.nodes):
            yield "nobody reads it"

    def of_quantizelinear(self, node: NodeProto) -> Iterator[str]:
        if any(one.op_type == "DequantizeLinear" for one in self.behind(node.input[0], (*COMMUTES, "Relu"))):
            yield "quantizes what is quantized already"
        scale = numpy_helper.to_array(self.constants[node.input[1]])
        kinds = [self.constants[name].data_type for name in node.input[2:]]
        kinds += [one.i for one in node.attribute if one.name == "output_dtype"]
        if scale.shape != () or not scale > 0 or kinds != [TensorProto.INT8]:
            yield f"step {scale}, type {kinds}"

    def of_reducemean(self, node: NodeProto) -> Iterator[str]:
        if not self.reads_int8(node.input[0]):
            yield "an average pool reads float"

    of_averagepool = of_globalaveragepool = of_reducemean


QUANTIZERS = Counter({
    "stem.0.input": 1,
    # Bottlenecks: the residual operand is the block's input, or the shortcut's output
    "same.input": 1, "same.two.0.input": 1, "same.three.0.input": 1,
    "wide.one.0.input": 1, "wide.two.0.input": 1, "wide.three.0.input": 1, "wide.down.1.output": 1,
    # what three branches read, also behind the max pool; what is concatenated, twice over
    "inception.a.conv.input": 2, "inception.b.1.conv.input": 1, "inception.a.output": 4,
    "dense.conv.input": 1, "dense.conv2.input": 1, "dense.pool.input": 1,
    "mobile.input": 1, "mobile.expand.2.output": 1, "mobile.fc1.input": 1, "mobile.fc2.input": 1,
    "mobile.gate.output": 1, "mobile.project.0.input": 1,
    "next.conv.input": 1, "next.conv.output": 1, "next.up.input": 1, "next.down.input": 1, "next.down.output": 1,
    "pool.input": 1, "fc.input": 1,
})  # fmt: skip


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path]:
    torch.manual_seed(0)
    model = Net()
    compress(model, activation_bits=8, quantize_outputs=True)
    model.train()
    for _ in range(8):
        model(torch.randn(2, 3, 16, 16))
    model.eval()
    path = tmp_path_factory.mktemp("quality") / "m.onnx"
    export(model, torch.randn(2, 3, 16, 16), path)
    return model, path


def test_q_and_dq_stand_where_tensorrt_wants_them(net: tuple[Net, Path]) -> None:
    _, path = net
    assert list(Graph(onnx.load(path)).violations()) == []
    assert Counter(one.name for one in stored_quantizers(path)) == QUANTIZERS


def test_no_clip_is_left_where_nothing_is_negative(net: tuple[Net, Path]) -> None:
    _, path = net
    nodes = [node.name for node in onnx.load(path).graph.node]
    assert [name for name in nodes if ".clip" in name] == []


def test_the_trained_model_computes_the_same(net: tuple[Net, Path]) -> None:
    model, path = net
    verdict = verify_model(path, codes=codes(model), model=model)
    assert verdict["codes"].status == verdict["parity.onnx"].status == "pass", verdict["parity.onnx"].detail


@pytest.mark.parametrize(
    ("pair", "found"),
    [
        ("wide.two.0.input", "a factor is not quantized"),
        ("wide.down.1.output", "its residual operand is not quantized"),
        ("inception.a.output", "operands have several steps"),
        ("pool.input", "an average pool reads float"),
    ],
)
def test_a_pair_that_is_missing_is_found(pair: str, found: str, net: tuple[Net, Path]) -> None:
    model = onnx.load(net[1])
    quantize, dequantize = (next(n for n in model.graph.node if n.name == f"{pair}.{kind}") for kind in ("q", "dq"))
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == dequantize.output[0]:
                node.input[index] = quantize.input[0]
    model.graph.node.remove(quantize)
    model.graph.node.remove(dequantize)
    assert any(found in problem for problem in Graph(model).violations())


@pytest.mark.parametrize(
    ("behind", "found"),
    [
        ("Conv", "stands between Conv and BatchNormalization"),
        ("BatchNormalization", "stands between BatchNormalization and Relu"),
        ("MaxPool", "quantizes what is quantized already"),
    ],
)
def test_a_pair_too_many_is_found(behind: str, found: str, net: tuple[Net, Path]) -> None:
    model = onnx.load(net[1])
    graph = model.graph
    index, node = next((i, n) for i, n in enumerate(graph.node) if n.op_type == behind)
    value = node.output[0]
    for reader in graph.node:
        for place, name in enumerate(reader.input):
            if name == value:
                reader.input[place] = "more.dq.out"
    scale = ["same.input.scale", "same.input.zero_point"]
    graph.node.insert(
        index + 1, onnx.helper.make_node("QuantizeLinear", [value, *scale], ["more.q.out"], name="more.q")
    )
    graph.node.insert(
        index + 2, onnx.helper.make_node("DequantizeLinear", ["more.q.out", *scale], ["more.dq.out"], name="more.dq")
    )
    assert any(found in problem for problem in Graph(model).violations())
