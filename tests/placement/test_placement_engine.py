"""Every placement that TensorRT-RTX takes, built for real: the engine holds the types that were placed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from placement_models import place, situation
from qdq_graphs import model as graph_of
from qdq_graphs import node, sparse_codes, tensor

from slope_compile.build.engine import build_engine
from slope_compile.events import Events
from slope_compile.recipe import BuildSection
from slope_compile.targets.backends import BACKENDS

RNG = np.random.default_rng(23)
rtx = pytest.mark.skipif(not BACKENDS["tensorrt-rtx"].installed(), reason="TensorRT-RTX is not installed")


def exported(path: Path, int8: bool) -> Path:
    """conv 64 -> 128, relu, mean, then matrices of 128 x 128 and 100 x 192, awkward K; `int8`: between quantizers."""
    weights = {"c": sparse_codes(RNG, (128, 64, 3, 3), 4, 1), "f": sparse_codes(RNG, (128, 100), 4, 0),
               "h": RNG.integers(-8, 8, (100, 192))}  # fmt: skip
    tensors, nodes = [tensor("s", 0.1, "FLOAT"), tensor("z", 0, "INT8")], []
    for name, codes in weights.items():
        axis = 0 if name == "c" else 1
        tensors.append(tensor(f"{name}.weight.codes", codes, "INT8" if int8 else "INT4"))
        tensors.append(tensor(f"{name}.weight.scale", RNG.uniform(0.01, 0.02, codes.shape[axis]), "FLOAT"))
        dq = node("DequantizeLinear", [f"{name}.weight.codes", f"{name}.weight.scale"], f"{name}.weight", axis=axis)
        nodes.append(dq)

    def quantized(value: str) -> str:
        if not int8:
            return value
        nodes.append(node("QuantizeLinear", [value, "s", "z"], f"{value}.q"))
        nodes.append(node("DequantizeLinear", [f"{value}.q", "s", "z"], f"{value}.dq"))
        return f"{value}.dq"

    nodes.append(node("Conv", [quantized("x"), "c.weight"], "c", pads=[1, 1, 1, 1]))
    nodes.append(node("Relu", ["c"], "r"))
    nodes += [node("GlobalAveragePool", [quantized("r")], "p"), node("Flatten", ["p"], "v")]
    nodes += [node("MatMul", [quantized("v"), "f.weight"], "f"), node("Relu", ["f"], "g")]
    nodes.append(node("MatMul", [quantized("g"), "h.weight"], "y"))
    proto = graph_of(nodes, tensors, opset=21)
    proto.ir_version = 10
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64, 8, 8]))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 192]))
    onnx.save(proto, path)
    return path


HELD = {"int4-weight": "Int4", "int4-storage": "Int4", "int8-weight": "Int8", "int8": "Int8", "sparse-int8": "Int8"}


@rtx
@pytest.mark.parametrize(
    ("precision", "overrides"),
    [
        ("fp16", {"c": "int4-storage", "f": "int4-weight", "h": "int8-weight"}),
        ("fp32", {"c": "int8-weight", "f": "float", "h": "int4-weight"}),
        ("fp16", {"c": "sparse-int8", "f": "int8", "h": "int8"}),
    ],
)
def test_the_engine_holds_what_was_placed(precision: Any, overrides: dict[str, str], tmp_path: Path) -> None:
    model = exported(tmp_path / "model.onnx", "int8" in overrides.values())
    rows = build(model, overrides, precision, tmp_path)
    assert {row["name"].removesuffix(".weight"): row["placement"] for row in rows} == overrides
    for row in rows:
        expected = HELD.get(row["placement"], "Half" if precision == "fp16" else "Float")
        assert (row["engine"]["dtype"], row["engine"]["held"]) == (expected, True), row


@rtx
def test_sparse_fp16_is_parsed_and_built_though_rtx_says_nothing_of_sparse_kernels(tmp_path: Path) -> None:
    """Placed for TensorRT, whose parser and type checks TensorRT-RTX shares; the engine holds FP16 constants."""
    model = exported(tmp_path / "model.onnx", int8=False)
    one = replace(situation(), overrides={"c": "sparse-fp16", "f": "sparse-fp16", "h": "int4-weight"})
    placed, places = place(model, one, tmp_path / "placed")
    assert [chosen.container for chosen in places] == ["FLOAT16", "FLOAT16", "INT4"]
    rows = build(placed, {"*": "float", "h": "int4-weight"}, "fp32", tmp_path)
    found = {row["name"]: row["engine"]["dtype"] for row in rows}
    assert found == {"c.weight": "Half", "f.weight": "Half", "h.weight": "Int4"}


def build(model: Path, overrides: dict[str, str], precision: str, out: Path) -> list[dict[str, Any]]:
    section = BuildSection.model_validate(
        {"backend": "tensorrt-rtx", "precision": precision, "placement": overrides, "batch": {"min": 1, "max": 8}}
    )
    rows: list[dict[str, Any]] = build_engine(model, "a100", section, out, Events())["layers"]
    return rows
