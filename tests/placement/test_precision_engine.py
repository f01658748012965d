"""What half precision does to real engines, built ahead of time with TensorRT-RTX: read from their layer lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from slope_compile.build.layers import EngineLayer, parse_layers
from slope_compile.build.process import run_worker
from slope_compile.build.worker import Request
from slope_compile.placement.passes.precision import SetPrecision
from slope_compile.targets.backends import BACKENDS

WIDTH = 256


def network() -> onnx.ModelProto:
    """Linear (INT4, blocks of 128) -> Gelu -> linear (INT8) -> Gelu -> Q/DQ -> linear (INT8 x INT8) -> relu."""
    rng = np.random.default_rng(0)
    nodes: list[Any] = []
    tensors = [numpy_helper.from_array(np.float32(0.02), "s"), numpy_helper.from_array(np.int8(0), "z")]
    for name, kind, scales, attributes in (
        ("a", ml_dtypes.int4, (WIDTH // 128, WIDTH), {"axis": 0, "block_size": 128}),
        ("b", np.int8, (WIDTH,), {"axis": 1}),
        ("c", np.int8, (WIDTH,), {"axis": 1}),
    ):
        tensors += [
            numpy_helper.from_array(rng.integers(-7, 8, (WIDTH, WIDTH)).astype(kind), f"{name}.codes"),
            numpy_helper.from_array(np.full(scales, 0.01, np.float32), f"{name}.scale"),
        ]
        inputs = [f"{name}.codes", f"{name}.scale"]
        nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dq", **attributes))
    nodes += [
        helper.make_node("MatMul", ["x", "a"], ["p"], name="first"),
        helper.make_node("Gelu", ["p"], ["g"], name="gelu"),
        helper.make_node("MatMul", ["g", "b"], ["q"], name="second"),
        helper.make_node("Gelu", ["q"], ["h"], name="gelu2"),
        helper.make_node("QuantizeLinear", ["h", "s", "z"], ["i"], name="q"),
        helper.make_node("DequantizeLinear", ["i", "s", "z"], ["d"], name="dq"),
        helper.make_node("MatMul", ["d", "c"], ["e"], name="third"),
        helper.make_node("Relu", ["e"], ["y"], name="relu"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 64, WIDTH]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def layers(model: onnx.ModelProto, folder: Path) -> dict[str, list[EngineLayer]]:
    """The engine layers of each ONNX node."""
    onnx.save(model, folder / "placed.onnx")
    shapes = {"x": ([1, 64, WIDTH], [8, 64, WIDTH], [16, 64, WIDTH])}
    backend = BACKENDS["tensorrt-rtx"]
    run_worker(Request(backend.name, "placed.onnx", (8, 0), shapes, False), backend, folder, folder / "log")
    by_node: dict[str, list[EngineLayer]] = {}
    for layer in parse_layers((folder / "log").read_text(encoding="utf-8", errors="replace")):
        for name in layer.onnx:
            by_node.setdefault(name, []).append(layer)
    return by_node


def reads(found: list[EngineLayer]) -> list[tuple[str, tuple[str, ...]]]:
    """The types of the weights that layers hold, each with those of the activations beside it."""
    return [(c.dtype, one.input_types) for one in found for c in one.constants if c.elements == WIDTH * WIDTH]


def test_fp16_keeps_every_weight_in_its_product(tmp_path: Path) -> None:
    model = ir.from_proto(network())
    SetPrecision("fp16")(model)
    by_node = layers(ir.to_proto(model), tmp_path)
    # Fused: one layer reads the codes and multiplies.
    assert reads(by_node["first"]) == [("Int4", ("Float",))]
    assert reads(by_node["second"]) == [("Int8", ("Half",))]
    assert reads(by_node["third"]) == [("Int8", ("Int8",))]


def test_a_cast_behind_int4_blocks_would_part_the_weight_from_its_product(tmp_path: Path) -> None:
    """Why such products stay float32: if this fails, TensorRT-RTX has learned to fuse them."""
    model = network()
    dequantize = next(node for node in model.graph.node if node.name == "a.dq")
    dequantize.output[0] = "a.float"
    cast = helper.make_node("Cast", ["a.float"], ["a"], name="a.cast", to=TensorProto.FLOAT16)
    model.graph.node.insert(list(model.graph.node).index(dequantize) + 1, cast)
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x.half"], name="x.cast", to=TensorProto.FLOAT16))
    first = next(node for node in model.graph.node if node.name == "first")
    first.input[0], first.output[0] = "x.half", "p.half"
    back = helper.make_node("Cast", ["p.half"], ["p"], name="p.cast", to=TensorProto.FLOAT)
    model.graph.node.insert(list(model.graph.node).index(first) + 1, back)
    by_node = layers(model, tmp_path)
    assert reads(by_node["a.dq"]) == [("Int4", ())]
    assert reads(by_node["first"]) == []
