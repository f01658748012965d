from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from placement_models import layers_of, situation
from qdq_graphs import model, node, sparse_codes, tensor

import slope_compile.placement.shapes as shapes_module
from slope_compile.errors import ArtifactError
from slope_compile.placement.choose import choose_places
from slope_compile.placement.layers import Layer
from slope_compile.placement.shapes import Shapes
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(17)


def save(path: Path, nodes: list[Any], tensors: list[Any], x: list[Any], y: list[Any] | None = None) -> Path:
    proto = model(nodes, tensors, opset=21)
    proto.ir_version = 10
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, x))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, y))
    onnx.save(proto, path)
    return path


def only(path: Path) -> Layer:
    (layer,) = layers_of(path)
    return layer


def conv(path: Path, shape: tuple[int, ...], x: list[Any], y: list[Any] | None, op: str = "Conv", **more: int) -> Path:
    tensors = [tensor("w.codes", RNG.integers(-8, 8, shape), "INT4"), tensor("w.scale", 0.1, "FLOAT")]
    nodes = [node("DequantizeLinear", ["w.codes", "w.scale"], "w"), node(op, ["x", "w"], "y", **more)]
    return save(path, nodes, tensors, x, y)


def test_a_convolution(tmp_path: Path) -> None:
    layer = only(conv(tmp_path / "m.onnx", (16, 4, 3, 3), ["batch", 8, 9, 7], ["batch", 16, 7, 5], group=2))
    assert (layer.op, layer.shape, layer.groups, layer.kernel) == ("Conv", (16, 4, 3, 3), 2, (3, 3))
    assert (layer.reduction, layer.channels, layer.positions, layer.positions_known) == (36, 16, 35, True)
    assert (layer.inputs, layer.outputs, layer.bits, layer.stored, layer.elements) == (504, 560, 4, "INT4", 576)
    assert not layer.is_gemm and layer.label == "w" and layer.opset == 21


def test_a_transposed_convolution_counts_input_positions(tmp_path: Path) -> None:
    x, y = ["batch", 8, 5, 5], ["batch", 4, 7, 7]
    layer = only(conv(tmp_path / "m.onnx", (8, 4, 3, 3), x, y, "ConvTranspose"))
    assert (layer.positions, layer.channels, layer.groups) == (25, 4, 1)


@pytest.mark.parametrize("first", ["batch", 4])
def test_tokens_of_one_image_are_counted(tmp_path: Path, first: Any) -> None:
    tensors = [tensor("w", RNG.standard_normal((8, 6)), "FLOAT")]
    path = save(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], "y")], tensors, [first, 5, 8], [first, 5, 6])
    layer = only(path)
    assert (layer.positions, layer.inputs, layer.outputs, layer.bits) == (5, 40, 30, None)
    assert (layer.reduction, layer.channels, layer.plain) == (8, 6, True)


def windows(path: Path, told: bool) -> Path:
    """Windows of an image: [4 * batch, 5, 8], as Swin has them, behind a Reshape to [-1, 5, 8]."""
    dims = onnx.numpy_helper.from_array(np.array([-1, 5, 8], np.int64), "dims")
    tensors = [tensor("w", RNG.standard_normal((8, 6)), "FLOAT"), dims]
    nodes = [node("Reshape", ["x", "dims"], "r"), node("MatMul", ["r", "w"], "y")]
    path = save(path, nodes, tensors, ["batch", 20, 8], ["4*batch", 5, 6] if told else None)
    proto = onnx.load(path)
    if told:
        proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, ["4*batch", 5, 8]))
    onnx.save(proto, path)
    return path


@pytest.mark.parametrize("told", [True, False], ids=["told", "inferred"])
def test_windows_of_an_image_count_as_positions(tmp_path: Path, told: bool) -> None:
    layer = only(windows(tmp_path / "m.onnx", told))
    assert (layer.positions, layer.positions_known, layer.inputs) == (20, True, 160)


@pytest.mark.parametrize(
    "child",
    ["import os; os.abort()", "import sys; sys.stdin.buffer.read(); print('no model')", "import time; time.sleep(60)"],
)
def test_shape_inference_that_crashes_costs_only_the_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: str
) -> None:
    monkeypatch.setattr(shapes_module, "_CHILD", child)
    monkeypatch.setattr(shapes_module, "_SECONDS", 0.3 if "sleep" in child else 30)
    layer = only(windows(tmp_path / "m.onnx", told=False))
    assert (layer.positions, layer.positions_known) == (1, False)


def test_a_batch_of_another_name_is_not_known() -> None:
    proto = model([node("Relu", ["x"], "y")], [])
    shapes = Shapes(proto, [])
    assert shapes.of("y") == (None, None) and shapes.per_image("y") is None and shapes.of("nothing") is None


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (["Relu", "QuantizeLinear"], True),
        (["Add", "Relu", "QuantizeLinear"], True),
        (["QuantizeLinear"], True),
        (["Gelu", "QuantizeLinear"], True),
        (["Sigmoid", "Mul", "QuantizeLinear"], True),  # SiLU
        (["Reshape", "QuantizeLinear"], True),
        (["Relu"], False),
        (["Softmax", "QuantizeLinear"], False),
        (["Relu", "QuantizeLinear", "also float"], False),
    ],
)
def test_whether_the_epilogue_is_int8(tmp_path: Path, tail: list[str], expected: bool) -> None:
    tensors = [tensor("w.codes", sparse_codes(RNG, (8, 8), 4, 0), "INT8"), tensor("w.scale", 0.1, "FLOAT")]
    tensors += [tensor("s", 0.1, "FLOAT"), tensor("z", 0, "INT8"), tensor("b", np.ones(8), "FLOAT")]
    tensors.append(onnx.numpy_helper.from_array(np.array([-1, 8], np.int64), "r"))
    nodes = [
        node("DequantizeLinear", ["w.codes", "w.scale"], "w"),
        node("QuantizeLinear", ["x", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "d"),
        node("MatMul", ["d", "w"], "v0"),
    ]
    value = "v0"
    for number, op in enumerate(tail, start=1):
        if op == "also float":
            nodes.append(node("Sqrt", [f"v{number - 2}"], "extra"))
            continue
        more = {"Add": ["b"], "Mul": ["v0"], "Reshape": ["r"], "QuantizeLinear": ["s", "z"]}.get(op, [])
        nodes.append(node(op, [value, *more], f"v{number}"))
        value = f"v{number}"
    last = ["DequantizeLinear", value, "s", "z"] if "QuantizeLinear" in tail else ["Sqrt", value]
    nodes.append(node(last[0], last[1:], "y"))
    path = save(tmp_path / "m.onnx", nodes, tensors, ["batch", 8], ["batch", 8])
    proto = onnx.load(path)
    for name in ("d", "v0"):
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]))
    onnx.save(proto, path)
    layer = only(path)
    assert layer.quantized_output is expected
    assert layer.quantized_input and layer.any_quantized_input and layer.sparse


def test_a_weight_of_a_quantized_and_of_a_float_product(tmp_path: Path) -> None:
    tensors = [tensor("w.codes", RNG.integers(-8, 8, (8, 8)), "INT8"), tensor("w.scale", 0.1, "FLOAT")]
    tensors += [tensor("s", 0.1, "FLOAT"), tensor("z", 0, "INT8")]
    nodes = [
        node("DequantizeLinear", ["w.codes", "w.scale"], "w"),
        node("QuantizeLinear", ["x", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "d"),
        node("MatMul", ["d", "w"], "m"),
        node("MatMul", ["m", "w"], "y"),
    ]
    layer = only(save(tmp_path / "m.onnx", nodes, tensors, ["batch", 8], ["batch", 8]))
    assert (layer.quantized_input, layer.any_quantized_input) == (False, True)
    assert layer.positions == 2 and layer.bits == 4


def test_a_product_with_one_factor_is_refused(tmp_path: Path) -> None:
    tensors = [tensor("w", RNG.standard_normal((8, 8)), "FLOAT")]
    path = save(tmp_path / "m.onnx", [node("MatMul", ["w"], "y")], tensors, ["batch", 8], ["batch", 8])
    with pytest.raises(ArtifactError, match="'MatMul:y' lacks an input"):
        layers_of(path)


def test_integers_that_are_no_weight_are_counted_too(tmp_path: Path) -> None:
    """MatMul multiplies INT64 shapes in some graphs."""
    constant = onnx.numpy_helper.from_array(np.ones((2, 2), np.int64), "w")
    nodes = [node("Shape", ["x"], "s"), node("MatMul", ["s", "w"], "m"), node("Reshape", ["x", "m"], "y")]
    path = save(tmp_path / "m.onnx", nodes, [constant], ["batch", 8], ["batch", 8])
    (place,) = choose_places(path, coded_weights(path), situation())
    assert (place.placement, place.container) == ("float", "INT64")
