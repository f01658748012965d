"""Quantizers of activations in the exported file: the same numbers to the bit, and a file that holds anything else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from slope_compile.compression.activations import OBSERVED_CALLS, ActivationQuantizer, TrainedQuantizer
from slope_compile.compression.api import codes, compress
from slope_compile.errors import CheckFailedError
from slope_compile.events import Events
from slope_compile.export.model import Files, export_model
from slope_compile.export.passes import run_pass
from slope_compile.export.passes.activations import ProveActivations, QuantizeActivations
from slope_compile.qdq.activations import stored_quantizers


def placed(quantizer: TrainedQuantizer, before: str | None = None, after: str | None = None) -> onnx.ModelProto:
    """A graph of one quantizer, between two other nodes if they are named."""
    nodes = [] if before is None else [helper.make_node(before, ["x"], ["b"])]
    source = "x" if before is None else "b"
    nodes.append(helper.make_node("FakeQuantize", [source], ["q"], domain="slope_compile", name=quantizer.name))
    nodes[-1].attribute.append(helper.make_attribute("name", quantizer.name))
    nodes.append(helper.make_node(after or "Identity", ["q"], ["y"]))
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, None])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [answer])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("slope_compile", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    run_pass(QuantizeActivations({quantizer.name: quantizer}), model)
    return ir.to_proto(model)


def run(model: onnx.ModelProto, x: np.ndarray, level: str = "ORT_DISABLE_ALL") -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def trained(bits: int, signed: bool, step: float) -> tuple[ActivationQuantizer, TrainedQuantizer]:
    module = ActivationQuantizer(bits)
    with torch.no_grad():
        module.calls.fill_(OBSERVED_CALLS)
        module.signed.fill_(signed)
        module.step.fill_(step)
    qn, qp = module.levels()
    scale = float(np.abs(np.float32(step)) + np.float32(1e-12))
    return module, TrainedQuantizer("a.input", bits, scale, -qn, qp)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), signed=st.booleans(), step=st.floats(2**-13, 2**10, width=32), seed=st.integers(0, 99))
def test_the_graph_gives_the_trained_numbers_bit_for_bit(bits: int, signed: bool, step: float, seed: int) -> None:
    module, quantizer = trained(bits, signed, step)
    rng = np.random.default_rng(seed)
    halves = (np.arange(-300, 301) / 2 * quantizer.scale).astype(np.float32)  # ties, and the ends of the range
    near = [np.nextafter(halves, np.float32(towards)) for towards in (9e9, -9e9)]
    others = np.append(rng.normal(size=3) * step, [-0.0, 3e38])
    x = np.concatenate([halves, *near, others]).astype(np.float32).reshape(4, -1)
    expected = module.eval()(torch.from_numpy(x)).detach().numpy()
    assert np.array_equal(run(placed(quantizer), x).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("bits", "signed", "before", "ops"),
    [
        (8, True, None, ["QuantizeLinear", "DequantizeLinear"]),
        (8, False, None, ["Relu", "QuantizeLinear", "DequantizeLinear"]),
        (8, False, "Relu", ["Relu", "QuantizeLinear", "DequantizeLinear"]),
        (4, False, "Relu", ["Relu", "Clip", "QuantizeLinear", "DequantizeLinear"]),
        (4, True, None, ["Clip", "QuantizeLinear", "DequantizeLinear"]),
    ],
)
def test_only_clips_that_are_needed(bits: int, signed: bool, before: str | None, ops: list[str]) -> None:
    model = placed(trained(bits, signed, 0.1)[1], before)
    assert [node.op_type for node in model.graph.node][:-1] == ops
    (found,) = stored_quantizers(model)
    assert (found.name, found.node, found.zero_point) == ("a.input", "a.input.q", 0)
    assert (found.low, found.high) == ((-8, 7) if signed else (0, 15)) if bits == 4 else (-128 if signed else 0, 127)


def test_onnx_runtime_optimizes_a_graph_that_moves_what_was_dequantized() -> None:
    model = placed(trained(4, True, 0.25)[1], after="Transpose")
    x = np.linspace(-4, 4, 8, dtype=np.float32).reshape(4, 2)
    assert np.array_equal(run(model, x, "ORT_ENABLE_ALL"), run(model, x))
    assert run(model, x).min() == -2.0


class Small(nn.Module):
    """Two layers that read one tensor, one that is called twice, a residual Add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.twice, self.left, self.right = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(4))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).relu()
        x = self.twice(self.twice(self.conv(x))).relu()
        return self.head(self.pool(self.left(x) + self.right(x)).flatten(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(0)
    model = Small()
    compress(model, bits=4, activation_bits=4)
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6))
    model.eval()
    files = Files.inside(tmp_path_factory.mktemp("activations"))
    x = torch.randn(6, 3, 6, 6)
    layers = export_model(model, codes(model), x, files, 21, Events())
    return SimpleNamespace(model=model, files=files, x=x, layers=layers)


def test_the_file_of_a_model(exported: SimpleNamespace) -> None:
    found = stored_quantizers(exported.files.model)
    assert [one.node for one in found] == [
        "stem.input.q", "conv.input.q", "twice.input.q", "twice.input.q_1", "left.input.q", "right.output.q",
        "pool.input.q", "head.input.q",
    ]  # fmt: skip
    steps = {name: quantizer.step.item() for name, quantizer in exported.model.named_modules() if name.endswith("er")}
    for one in found:
        assert np.float32(one.scale) == np.float32(steps[f"{one.name}_quantizer"]) + np.float32(1e-12)
    rows = exported.layers["layers"]
    assert {row["name"]: (row["placement"], row["container"]) for row in rows} == {
        "stem.weight": ("int8", "INT8"), "head.weight": ("int8", "INT8"),
        **{f"{name}.weight": ("sparse-int8", "INT8") for name in ("conv", "twice", "left", "right")},
    }  # fmt: skip
    assert {row["name"]: row["pairs"] for row in exported.layers["activations"]}["twice.input"] == 2
    assert {entry.domain for entry in onnx.load(exported.files.model).opset_import} == {""}


def test_the_file_answers_like_the_model(exported: SimpleNamespace) -> None:
    session = ort.InferenceSession(exported.files.model, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"input": exported.x.numpy()})
    np.testing.assert_allclose(made, exported.model(exported.x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("what", ["scale", "zero point", "range", "missing"])
def test_a_file_that_holds_another_quantizer_is_refused(exported: SimpleNamespace, tmp_path: Path, what: str) -> None:
    proto = onnx.load(exported.files.model)
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    if what == "missing":
        clip = next(node for node in proto.graph.node if node.name == "conv.input.clip")
        reader = next(node for node in proto.graph.node if "conv.input.dq.out" in node.input)
        reader.input[0] = clip.input[0]
        for name in ("conv.input.q", "conv.input.dq"):
            proto.graph.node.remove(next(node for node in proto.graph.node if node.name == name))
    else:
        name, change = {"scale": ("scale", 1.01), "zero point": ("zero_point", 1), "range": ("max", 0.5)}[what]
        tensor = tensors[f"conv.input.{name}"]
        old = numpy_helper.to_array(tensor)
        new = old + np.int8(1) if what == "zero point" else old * np.float32(change)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(new), tensor.name))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    quantizers = {
        row["name"]: TrainedQuantizer(*(row[key] for key in ("name", "bits", "scale", "low", "high")))
        for row in exported.layers["activations"]
    }
    pairs = {row["name"]: row["pairs"] for row in exported.layers["activations"]}
    run_pass(ProveActivations(exported.files.model, quantizers, pairs), ir.load(exported.files.model))
    with pytest.raises(CheckFailedError, match=r"conv\.input"):
        run_pass(ProveActivations(path, quantizers, pairs), ir.load(path))
