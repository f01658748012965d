from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from placement_models import run_proto
from qdq_graphs import coded, model, node, tensor

from slope_compile.placement.passes.blocks import Scales, SetScales
from slope_compile.placement.scales import blocked_scale, default_block, row_scale
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(7)


def blocked(source: onnx.ModelProto, block: int) -> onnx.ModelProto:
    (weight,) = coded_weights(source)
    axis = weight.reduction_axis
    assert axis is not None
    scale = blocked_scale(weight, block) if block else row_scale(weight)
    assert scale is not None
    graph = ir.from_proto(source)
    SetScales({"w": Scales(scale, axis if block else 1 - axis, block)})(graph)
    made = ir.to_proto(graph)
    onnx.checker.check_model(made, full_check=True)
    return made


def matrix(op: str, k: int, n: int, scale: str, dtype: str = "INT4") -> onnx.ModelProto:
    shape, rows = ((k, n), 1) if op == "MatMul" else ((n, k), 0)
    one = RNG.uniform(0.1, 1, 1 if scale == "tensor" else n).astype(np.float32)
    attributes: dict[str, Any] = {"axis": rows} if scale == "channel" else {}
    if scale == "blocks":
        halves = RNG.uniform(0.1, 1, (n, -(-k // 64))).astype(np.float32)
        one, attributes = (halves, {"axis": 1}) if rows == 0 else (np.ascontiguousarray(halves.T), {"axis": 0})
        attributes["block_size"] = 64
    if op == "Gemm":
        attributes["transB"] = 1
    return coded(RNG.integers(-8, 8, shape), one if scale != "tensor" else one[0], dtype, op, **attributes)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize(("k", "block"), [(128, 64), (192, 64), (256, 128), (100, 64), (33, 64), (130, 128), (64, 64)])
def test_repeated_scales_are_the_same_numbers(op: str, scale: str, k: int, block: int) -> None:
    source = matrix(op, k, 6, scale)
    made = blocked(source, block)
    (old,), (new,) = coded_weights(source), coded_weights(made)
    axis = old.reduction_axis
    assert (new.block_size, new.axis, new.stored.shape[axis]) == (block, axis, -(-k // block) * block)
    values = np.moveaxis(new.values(), axis, 0)
    assert np.array_equal(values[:k].view(np.uint32), np.moveaxis(old.values(), axis, 0).view(np.uint32))
    assert not values[k:].any()
    x = RNG.standard_normal((5, k)).astype(np.float32)
    np.testing.assert_allclose(run_proto(made, x), run_proto(source, x), rtol=1e-5, atol=1e-4)
    if k % block == 0:
        assert np.array_equal(run_proto(made, x), run_proto(source, x))
        back = coded_weights(blocked(made, 0))[0]
        assert back.block_size == 0 and np.array_equal(back.values(), old.values())


def test_blocks_may_become_shorter_and_longer_only_where_scales_agree() -> None:
    (own,) = coded_weights(matrix("Gemm", 256, 4, "blocks"))
    assert blocked_scale(own, 64) is not None and blocked_scale(own, 32).shape == (4, 8)
    assert blocked_scale(own, 128) is None and row_scale(own) is None
    (channel,) = coded_weights(matrix("MatMul", 256, 4, "channel"))
    assert blocked_scale(channel, 128).shape == (2, 4)
    (along,) = coded_weights(coded(np.ones((6, 4)), np.arange(1, 7), op="MatMul", axis=0))  # one scale per input
    assert blocked_scale(along, 64) is None and row_scale(along) is None


@pytest.mark.parametrize(
    ("k", "block"), [(1024, 128), (192, 64), (128, 64), (100, 64), (130, 64), (250, 128), (33, 64)]
)
def test_default_block_pads_least_and_leaves_no_single_block_of_128(k: int, block: int) -> None:
    assert default_block(k) == block


def test_tokens_are_padded_along_their_last_axis() -> None:
    source = matrix("MatMul", 100, 6, "channel")
    for values, dims in ((source.graph.input, [2, 5, 100]), (source.graph.output, [2, 5, 6])):
        values[0].CopyFrom(helper.make_tensor_value_info(values[0].name, TensorProto.FLOAT, dims))
    x = RNG.standard_normal((2, 5, 100)).astype(np.float32)
    made = blocked(source, 64)
    np.testing.assert_allclose(run_proto(made, x), run_proto(source, x), rtol=1e-5, atol=1e-4)
    assert [n.op_type for n in made.graph.node].count("Pad") == 1


def test_a_transposed_first_factor_is_padded_along_axis_0() -> None:
    source = matrix("Gemm", 100, 6, "channel")
    source.graph.node[1].attribute.append(onnx.helper.make_attribute("transA", 1))
    x = RNG.standard_normal((100, 5)).astype(np.float32)
    np.testing.assert_allclose(run_proto(blocked(source, 64), x), run_proto(source, x), rtol=1e-5, atol=1e-4)


def test_scales_that_others_read_stay_theirs() -> None:
    tensors = [tensor("a", RNG.integers(-8, 8, (64, 4)), "INT4"), tensor("b", RNG.integers(-8, 8, (4, 4)), "INT4")]
    tensors.append(tensor("s", RNG.uniform(0.1, 1, 4), "FLOAT"))
    nodes = [node("DequantizeLinear", ["a", "s"], "wa", axis=1), node("DequantizeLinear", ["b", "s"], "wb", axis=1)]
    nodes += [node("MatMul", ["x", "wa"], "m"), node("MatMul", ["m", "wb"], "y")]
    graph = ir.from_proto(model(nodes, tensors))
    SetScales({"a": Scales(np.ones((1, 4), np.float32), 0, 64)})(graph)
    first, second = coded_weights(ir.to_proto(graph))
    assert (first.block_size, second.block_size, second.scale.shape) == (64, 0, (4,))


@pytest.mark.parametrize("kind", ["first factor", "other reader", "turned", "zero point"])
def test_what_cannot_be_given_blocks_is_refused(kind: str) -> None:
    source = matrix("MatMul", 100, 6, "channel")
    nodes = source.graph.node
    if kind == "first factor":
        nodes[1].input[:] = ["w", "x"]
    elif kind == "other reader":
        nodes.append(node("Relu", ["w"], "z"))
    elif kind == "turned":
        nodes.insert(0, node("Transpose", ["w.codes"], "t", perm=[1, 0]))
        nodes[1].input[0] = "t"
    else:
        source.graph.initializer.append(tensor("z", np.ones(6), "INT4"))
        nodes[0].input.append("z")
    graph = ir.from_proto(source)
    with pytest.raises(ir.passes.PreconditionError, match="'w'"):
        SetScales({"w": Scales(np.ones((2, 6), np.float32), 0, 64)})(graph)
    assert graph.graph.initializers["w.codes"].shape == (100, 6)  # nothing was begun
