from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from placement_models import run_proto
from qdq_graphs import model, node, tensor

from slope_compile.placement.passes.gemm import FORMS, MatMulToGemm, wanted_form

RNG = np.random.default_rng(11)


def product(dims: list[Any], out: list[Any], factors: list[str] | None = None) -> onnx.ModelProto:
    """x @ w, then a bias; the shapes are in the file."""
    tensors = [tensor("w", RNG.standard_normal((12, 8)), "FLOAT"), tensor("b", RNG.standard_normal(8), "FLOAT")]
    nodes = [node("MatMul", factors or ["x", "w"], "m"), node("Add", ["m", "b"], "y")]
    made = model(nodes, tensors, opset=21)
    made.ir_version = 10
    made.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, out))
    made.graph.value_info.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, out))
    return made


def gemm(source: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(source)
    MatMulToGemm(["w"])(graph)
    made = ir.to_proto(graph)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize(
    ("dims", "out", "operators"),
    [
        (["batch", 12], ["batch", 8], ["Gemm", "Add"]),
        (["batch", 5, 12], ["batch", 5, 8], ["Flatten", "Gemm", "Reshape", "Add"]),
        (["batch", 2, 3, 12], ["batch", 2, 3, 8], ["Flatten", "Gemm", "Reshape", "Add"]),
        ([3, "tokens", 12], [3, "tokens", 8], ["Flatten", "Gemm", "Reshape", "Add"]),
        (["batch", "tokens", 12], ["batch", "tokens", 8], ["MatMul", "Add"]),
    ],
)
def test_the_same_numbers_as_gemm(dims: list[Any], out: list[Any], operators: list[str]) -> None:
    source = product(dims, out)
    made = gemm(source)
    assert [one.op_type for one in made.graph.node] == operators
    x = RNG.standard_normal([4 if isinstance(size, str) else size for size in dims]).astype(np.float32)
    np.testing.assert_allclose(run_proto(made, x), run_proto(source, x), rtol=1e-5, atol=1e-5)
    names = {one.name for one in made.graph.node}
    assert "MatMul:m" in names  # the engine's layer list calls it so


def test_an_output_of_the_graph_keeps_its_name() -> None:
    source = product(["batch", 5, 12], ["batch", 5, 8])
    del source.graph.node[1], source.graph.initializer[1]
    source.graph.node[0].output[0] = "y"
    made = gemm(source)
    assert [one.name for one in made.graph.output] == ["y"]
    x = RNG.standard_normal((2, 5, 12)).astype(np.float32)
    np.testing.assert_allclose(run_proto(made, x), run_proto(source, x), rtol=1e-5, atol=1e-5)


def test_a_first_factor_stays() -> None:
    source = product([8, 5], [12, 5], ["w", "x"])
    del source.graph.node[1], source.graph.initializer[1]
    source.graph.node[0].output[0] = "y"
    assert [one.op_type for one in gemm(source).graph.node] == ["MatMul"]


def test_what_the_pass_ensures() -> None:
    with pytest.raises(ir.passes.PostconditionError, match="the MatMul 'MatMul:m' of 'w' is no Gemm yet"):
        MatMulToGemm(["w"]).ensures(ir.from_proto(product(["batch", 5, 12], ["batch", 5, 8])))
    MatMulToGemm(["w"]).ensures(ir.from_proto(product(["batch", "tokens", 12], ["batch", "tokens", 8])))
    wrong = product(["batch", 5, 12], ["batch", 5, 8])
    wrong.graph.node[0].op_type = "Gemm"
    with pytest.raises(ir.passes.PostconditionError, match="the Gemm 'MatMul:m' of 'w' reads 3 axes"):
        MatMulToGemm(["w"]).ensures(ir.from_proto(wrong))


def test_the_latest_row_of_the_table_that_fits_counts() -> None:
    assert wanted_form("tensorrt", (10, 3), "sparse-fp16") == wanted_form("tensorrt", (11, 4), "sparse-fp16") == "Gemm"
    assert wanted_form("tensorrt", (11, 4), "sparse-int8") == "as exported"
    assert wanted_form("tensorrt-rtx", (1, 7, 1), "sparse-fp16") == "as exported"
    assert all(row.source for row in FORMS)
