from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from placement_models import run_proto
from qdq_graphs import coded, model, node, tensor

from slope_compile.placement.passes.fold import FoldWeights, RemoveQuantizers
from slope_compile.placement.rounding import exact_values, rounded, rounding
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(13)


def fold(source: onnx.ModelProto) -> onnx.ModelProto:
    graph = ir.from_proto(source)
    FoldWeights({weight.name: exact_values(weight) for weight in coded_weights(source)})(graph)
    made = ir.to_proto(graph)
    onnx.checker.check_model(made, full_check=True)
    return made


@pytest.mark.parametrize("scale_dtype", ["FLOAT", "FLOAT16"])
def test_a_constant_of_the_same_values(scale_dtype: str) -> None:
    scale = RNG.uniform(0.1, 1, 5)
    source = coded(RNG.integers(-8, 8, (12, 5)), scale, op="MatMul", axis=1, scale_dtype=scale_dtype)
    if scale_dtype == "FLOAT16":
        source.graph.node.insert(0, node("Cast", ["x"], "xh", to=10))
        source.graph.node[2].input[0] = "xh"
        source.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    made = fold(source)
    (old,), (new,) = coded_weights(source), coded_weights(made)
    assert (new.name, new.dtype) == ("w", scale_dtype)
    assert np.array_equal(old.values(), new.values())
    x = RNG.standard_normal((3, 12)).astype(np.float32)
    assert np.array_equal(run_proto(source, x), run_proto(made, x))
    assert [one.name for one in made.graph.initializer] == ["w"]


def test_codes_that_are_turned_first_and_a_foreign_name() -> None:
    tensors = [tensor("q", RNG.integers(-8, 8, (5, 12)), "INT8"), tensor("s", RNG.uniform(0.1, 1, 5), "FLOAT")]
    nodes = [node("Transpose", ["q"], "t", perm=[1, 0]), node("DequantizeLinear", ["t", "s"], "d", axis=1)]
    source = model([*nodes, node("MatMul", ["x", "d"], "y")], tensors)
    x = RNG.standard_normal((3, 12)).astype(np.float32)
    expected = run_proto(source, x)
    made = fold(source)
    assert [(one.name, one.dims) for one in made.graph.initializer] == [("q", [12, 5])]
    assert np.array_equal(run_proto(made, x), expected)


def test_codes_dequantized_in_two_ways_are_refused() -> None:
    tensors = [tensor("q", RNG.integers(-8, 8, (4, 4)), "INT8"), tensor("s", 0.5, "FLOAT"), tensor("t", 0.25, "FLOAT")]
    nodes = [node("DequantizeLinear", ["q", "s"], "a"), node("DequantizeLinear", ["q", "t"], "b")]
    nodes += [node("MatMul", ["x", "a"], "m"), node("MatMul", ["m", "b"], "y")]
    with pytest.raises(ir.passes.PreconditionError, match="'q' are dequantized in 2 ways"):
        fold(model(nodes, tensors))


@pytest.mark.parametrize(
    ("clip", "quantizer", "op", "own"),
    [
        ("", "a.input.q", "Clip", True),
        ("a.input.clip", "a.input.q", "Clip", True),
        ("a.input.clip_1", "a.input.q_1", "Clip", True),
        ("a.input.clip", "a.input.q", "Relu", True),
        ("relu6", "a.input.q", "Clip", False),
        ("clip_1", "a.input.q", "Clip", False),  # a ReLU6 of a model's own
        ("clip_1", "q_1", "Clip", False),
        ("b.clip", "a.input.q", "Clip", False),
        ("a.input.clip_1", "a.input.q", "Clip", False),
        ("a.input.clip", "a.input.q", "Tanh", False),
        ("a.input.clip", "QuantizeLinear_3", "Clip", False),
    ],
)
def test_quantizers_of_activations_go_with_their_own_clip_alone(clip: str, quantizer: str, op: str, own: bool) -> None:
    tensors = [tensor("s", 0.1, "FLOAT"), tensor("z", 0, "INT8"), tensor("w", RNG.standard_normal((4, 4)), "FLOAT")]
    tensors += [tensor("low", -1.0, "FLOAT"), tensor("high", 1.0, "FLOAT")]
    nodes: list[Any] = []
    if clip:
        nodes.append(node(op, ["x", *(["low", "high"] if op == "Clip" else [])], "c"))
        nodes[0].name = clip
    nodes += [
        node("QuantizeLinear", ["c" if clip else "x", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "d"),
        node("MatMul", ["d", "w"], "y"),
    ]
    nodes[-3].name = quantizer
    graph = ir.from_proto(model(nodes, tensors))
    RemoveQuantizers()(graph)
    assert [one.op_type for one in graph.graph] == (["MatMul"] if own else [op, "MatMul"])


@pytest.mark.parametrize(("dtype", "digits"), [("FLOAT16", 10), ("BFLOAT16", 7)])
def test_rounding_is_measured_and_at_most_half_an_ulp(dtype: str, digits: int) -> None:
    source = coded(RNG.integers(-8, 8, (64, 64)), RNG.uniform(0.01, 1, 64), op="MatMul", axis=1)
    (weight,) = coded_weights(source)
    found, exact = rounding(weight, dtype), exact_values(weight)
    moved = np.abs(rounded(exact, dtype) - exact)
    assert np.max(moved[exact != 0] / np.abs(exact[exact != 0])) <= found.relative <= 2.0 ** -(digits + 1)
    assert 0.4 < found.ulp <= 0.5
    assert not found.overflows and "ulp" in str(found)


def test_a_weight_beyond_fp16_overflows_and_a_power_of_two_does_not_move() -> None:
    (big,) = coded_weights(coded(np.array([[1, 4]]), 2.0**15, op="MatMul"))
    assert rounding(big, "FLOAT16").overflows and not rounding(big, "BFLOAT16").overflows
    (even,) = coded_weights(coded(np.array([[1, -4]]), 2.0**-3, op="MatMul"))
    assert (rounding(even, "FLOAT16").relative, rounding(even, "FLOAT16").ulp) == (0, 0)
