from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from qdq_graphs import coded, model, node, shape, sparse_codes, tensor

from slope_compile.errors import ArtifactError
from slope_compile.qdq.checks import check_pattern
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(7)
SCALES = RNG.uniform(0.5, 2, 8).astype(np.float32)


def only(source: onnx.ModelProto) -> Any:
    (weight,) = coded_weights(source)
    return weight


def test_conv() -> None:
    codes = sparse_codes(RNG, (8, 12, 3, 3), 4, axis=1)
    weight = only(coded(codes, SCALES))
    assert (weight.name, weight.dtype, weight.op, weight.node) == ("w", "INT4", "Conv", "Conv:y")
    assert (weight.axis, weight.block_size, weight.reduction_axis, weight.zero_point) == (0, 0, 1, None)
    assert np.array_equal(weight.codes, codes)
    assert np.array_equal(weight.values(), codes * SCALES.reshape(8, 1, 1, 1))
    assert np.array_equal(weight.channel_scale(0), SCALES)


@pytest.mark.parametrize(
    ("op", "attributes", "axis"),
    [
        ("Conv", {}, 1),
        ("ConvTranspose", {}, 0),
        ("MatMul", {}, 0),
        ("Gemm", {}, 0),
        ("Gemm", {"transB": 1}, 1),
    ],
)
@pytest.mark.parametrize("dtype", ["INT2", "INT4", "INT8"])
def test_the_axis_that_an_operator_sums_over(op: str, attributes: dict, axis: int, dtype: str) -> None:
    dims = (8, 8, 3, 3) if "Conv" in op else (8, 8)
    codes = sparse_codes(np.random.default_rng(0), dims, int(dtype[3]), axis=axis)
    weight = only(coded(codes, SCALES, dtype, op, **attributes))
    assert weight.reduction_axis == weight.consumed_axis == axis
    assert check_pattern(weight, 2, 4) == []
    weight = only(coded(codes.swapaxes(0, 1), SCALES, dtype, op, **attributes))
    assert check_pattern(weight, 2, 4)[0].tensor == "w"


@pytest.mark.parametrize(("op", "attributes", "axis"), [("MatMul", {}, 1), ("Gemm", {}, 1), ("Gemm", {"transA": 1}, 0)])
def test_a_constant_first_factor(op: str, attributes: dict, axis: int) -> None:
    weight = only(model([node(op, ["w", "x"], "y", **attributes)], [tensor("w", np.ones((8, 8)), "FLOAT")]))
    assert (weight.reduction_axis, weight.codes, weight.scale) == (axis, None, None)


def test_of_two_constants_the_second_is_the_weight() -> None:
    tensors = [tensor("a", np.ones((1, 4)), "FLOAT"), tensor("b", np.ones((4, 4)), "FLOAT")]
    assert only(model([node("MatMul", ["a", "b"], "y")], tensors)).name == "b"


@pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16", "BFLOAT16"])
def test_float_weights(dtype: str) -> None:
    values = sparse_codes(RNG, (8, 8), 4, axis=0)
    nodes = [node("Cast", ["w"], "wide", to=TensorProto.FLOAT), node("MatMul", ["x", "wide"], "y")]
    weight = only(model(nodes, [tensor("w", values, dtype)]))
    assert (weight.name, weight.dtype, weight.codes) == ("w", dtype, None)
    assert weight.values().dtype == np.float32
    assert np.array_equal(weight.values(), values)
    assert check_pattern(weight, 2, 4) == []


def test_floats_that_the_graph_quantizes_as_it_runs() -> None:
    nodes = [
        node("QuantizeLinear", ["w", "s", "z"], "q"),
        node("DequantizeLinear", ["q", "s", "z"], "d"),
        node("MatMul", ["x", "d"], "y"),
    ]
    tensors = [tensor("w", np.eye(4), "FLOAT"), tensor("s", 0.5, "FLOAT"), tensor("z", 0, "INT8")]
    weight = only(model(nodes, tensors))
    assert (weight.codes, weight.scale, weight.dtype) == (None, None, "FLOAT")


def test_half_scales_round_the_products() -> None:
    codes, scale = np.array([[7, 3], [-8, 5]]), np.array([0.1, 0.3], dtype=np.float16)
    source = coded(codes, scale, op="MatMul", scale_dtype="FLOAT16", axis=1)
    weight = only(source)
    assert weight.value_dtype == "FLOAT16"
    half = (codes.astype(np.float16) * scale).astype(np.float32)
    assert np.array_equal(weight.values(), half)
    assert not np.array_equal(half, codes * scale.astype(np.float32))


@pytest.mark.parametrize(
    ("dims", "scale_dims", "axis", "block"),
    [((6, 4), (), 0, 0), ((6, 4), (6,), 0, 0), ((6, 4), (4,), -1, 0), ((6, 4), (6, 2), 1, 2), ((6, 5), (2, 5), 0, 4)],
)
@pytest.mark.parametrize("zero", [False, True])
def test_values_are_those_of_the_onnx_reference(
    dims: tuple[int, ...], scale_dims: tuple[int, ...], axis: int, block: int, zero: bool
) -> None:
    codes, scale = RNG.integers(-8, 8, dims), RNG.uniform(0.1, 1, scale_dims).astype(np.float32)
    zero_point = RNG.integers(-8, 8, scale_dims) if zero else None
    source = coded(codes, scale, op="MatMul", axis=axis, block_size=block, zero_point=zero_point)
    weight = only(source)
    x = np.eye(dims[0], dtype=np.float32)
    assert np.array_equal(ReferenceEvaluator(source).run(None, {"x": x})[0], weight.values())
    assert (weight.zero_point is not None) == zero


def test_unsigned_types_report_their_zero_point() -> None:
    codes = RNG.integers(0, 16, (4, 4))
    weight = only(coded(codes, 0.5, "UINT4", "MatMul", zero_point=8))
    assert weight.codes.dtype == np.uint8
    assert int(weight.zero_point) == 8
    assert np.array_equal(weight.values(), (codes - 8) * np.float32(0.5))


def chain(codes: np.ndarray, steps: list[tuple[str, list[int]]], op: str, after: bool) -> onnx.ModelProto:
    """codes -> Transpose and Reshape -> op, dequantized before (or after) the steps with one scale."""
    nodes, tensors, name = [], [tensor("w.codes", codes, "INT4"), tensor("s", 0.5, "FLOAT")], "w.codes"
    if not after:
        nodes.append(node("DequantizeLinear", [name, "s"], "dq"))
        name = "dq"
    for i, (kind, dims) in enumerate(steps):
        if kind == "Transpose":
            nodes.append(node("Transpose", [name], f"t{i}", perm=dims))
        else:
            tensors.append(shape(f"shape{i}", dims))
            nodes.append(node("Reshape", [name, f"shape{i}"], f"t{i}"))
        name = f"t{i}"
    if after:
        nodes.append(node("DequantizeLinear", [name, "s"], "dq"))
        name = "dq"
    nodes += [node("Identity", [name], "same"), node(op, ["x", "same"], "y")]
    return model(nodes, tensors, rank=4 if op == "Conv" else 2)


LAYOUTS = [
    # (stored shape, axis of the groups there, steps, operator, reduction axis in the stored layout)
    ((8, 12), 1, [("Transpose", [1, 0])], "MatMul", 1),
    ((8, 12), 0, [("Transpose", [1, 0]), ("Transpose", [1, 0])], "MatMul", 0),
    ((8, 3, 3, 4), 3, [("Transpose", [0, 3, 1, 2])], "Conv", 3),
    ((3, 3, 4, 8), 2, [("Transpose", [3, 2, 0, 1])], "Conv", 2),
    ((8, 4, 3, 3), 1, [("Reshape", [8, 36]), ("Reshape", [8, 4, 3, 3])], "Conv", None),
    ((8, 4), 1, [("Reshape", [0, -1, 1, 1])], "Conv", 1),
    ((2, 4, 12), 2, [("Reshape", [-1, 12]), ("Transpose", [1, 0])], "MatMul", 2),
]


@pytest.mark.parametrize(("dims", "groups", "steps", "op", "axis"), LAYOUTS)
@pytest.mark.parametrize("after", [False, True])
def test_layouts_are_followed(dims: tuple, groups: int, steps: list, op: str, axis: int | None, after: bool) -> None:
    codes = sparse_codes(RNG, dims, 4, axis=groups)
    weight = only(chain(codes, steps, op, after))
    expected = codes
    for kind, target in steps:
        resolved = [codes.shape[i] if n == 0 else n for i, n in enumerate(target)]
        expected = expected.transpose(target) if kind == "Transpose" else expected.reshape(resolved)
    assert np.array_equal(weight.consumed(weight.codes), expected)
    assert check_pattern(weight, 2, 4) == []
    if not after:
        assert weight.reduction_axis == axis
    dense = only(chain(np.ones(dims), steps, op, after))
    assert check_pattern(dense, 2, 4)[0].rule == "pattern"


def test_a_matrix_reshaped_to_a_kernel_is_grouped_by_channel() -> None:
    kernel = sparse_codes(RNG, (8, 4, 3, 3), 4, axis=1)
    weight = only(chain(kernel.reshape(8, 36), [("Reshape", [8, 4, 3, 3])], "Conv", False))
    assert weight.codes.shape == (8, 36)
    assert weight.reduction_axis is None
    assert check_pattern(weight, 2, 4) == []


def test_constants_may_be_nodes() -> None:
    codes = tensor("", np.ones((4, 4)), "INT4")
    nodes = [
        node("Constant", [], "c", value=codes),
        node("Constant", [], "s", value_float=0.25),
        node("DequantizeLinear", ["c", "s"], "w"),
        node("Constant", [], "perm", value_ints=[4, 4]),
        node("Reshape", ["w", "perm"], "r"),
        node("MatMul", ["x", "r"], "y"),
    ]
    weight = only(model(nodes, []))
    assert (weight.name, weight.values().max()) == ("c", 0.25)


def test_one_weight_with_two_uses_is_returned_once() -> None:
    source = coded(np.ones((4, 4)), 1.0, op="MatMul")
    source.graph.node.append(node("MatMul", ["y", "w"], "z"))
    assert len(coded_weights(source)) == 1


def test_activations_and_foreign_operators_are_no_weights() -> None:
    foreign = helper.make_node("MatMul", ["x", "w"], ["y"], domain="other")
    assert coded_weights(model([foreign], [tensor("w", np.ones((4, 4)), "FLOAT")])) == []
    assert coded_weights(model([node("Transpose", ["x"], "t"), node("MatMul", ["t", "x"], "y")], [])) == []


def branch(name: str) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
    nodes = [
        node("DequantizeLinear", ["w.codes", "w.scale"], f"{name}.w"),
        node("MatMul", ["x", f"{name}.w"], f"{name}.y"),
    ]
    return helper.make_graph(nodes, name, [], [output])


def test_weights_inside_subgraphs_are_found() -> None:
    choose = helper.make_node("If", ["c"], ["y"], then_branch=branch("then"), else_branch=branch("else"))
    tensors = [tensor("w.codes", np.ones((4, 4)), "INT4"), tensor("w.scale", 0.5, "FLOAT")]
    tensors.append(helper.make_tensor("c", TensorProto.BOOL, [], [True]))
    found = coded_weights(model([choose], tensors))
    assert [w.name for w in found] == ["w", "w"]
    assert {w.node for w in found} == {"MatMul:then.y", "MatMul:else.y"}


def test_weights_behind_local_functions_are_found() -> None:
    body = [
        node("DequantizeLinear", ["codes", "scale"], "weight"),
        helper.make_node("Gemm", ["a", "weight"], ["b"], name="inner"),
    ]
    body[1].attribute.add(name="transB", ref_attr_name="turned", type=onnx.AttributeProto.INT)
    opsets = [helper.make_opsetid("", 25)]
    function = helper.make_function("local", "Dense", ["a", "codes", "scale"], ["b"], body, opsets, ["turned"])
    call = helper.make_node("Dense", ["x", "w.codes", "w.scale"], ["y"], domain="local", turned=1)
    tensors = [tensor("w.codes", np.ones((4, 8)), "INT4"), tensor("w.scale", 0.5, "FLOAT")]
    weight = only(model([call], tensors, functions=(function,)))
    assert (weight.name, weight.node, weight.reduction_axis) == ("w", "inner", 1)


def test_a_function_that_calls_itself_is_refused() -> None:
    inner = helper.make_node("Self", ["a"], ["b"], domain="local")
    opsets = [helper.make_opsetid("", 25), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Self", ["a"], ["b"], [inner], opsets)
    call = helper.make_node("Self", ["x"], ["y"], domain="local")
    with pytest.raises(ArtifactError, match="too deeply"):
        coded_weights(model([call], [], functions=(function,)))


@pytest.mark.parametrize(
    ("nodes", "tensors", "named"),
    [
        ([node("Transpose", ["w"], "t", perm=[0, 0]), node("MatMul", ["x", "t"], "y")], [], "w"),
        ([node("Reshape", ["w", "d"], "t"), node("MatMul", ["x", "t"], "y")], [shape("d", [3, 5])], "w"),
        ([node("Reshape", ["w", "d"], "t"), node("MatMul", ["x", "t"], "y")], [shape("d", [-1, -1])], "w"),
        ([node("Reshape", ["w", "x"], "t"), node("MatMul", ["x", "t"], "y")], [], "w"),
        ([node("Reshape", ["w"], "t"), node("MatMul", ["x", "t"], "y")], [], "w"),
        ([node("Conv", ["x", "w"], "y")], [], "w"),
        ([node("MatMul", ["x", "a"], "y"), node("Identity", ["b"], "a"), node("Identity", ["a"], "b")], [], "itself"),
        ([node("Identity", ["x"], "w"), node("MatMul", ["x", "w"], "y")], [], "w"),
        ([node("DequantizeLinear", ["w"], "d"), node("MatMul", ["x", "d"], "y")], [], "w"),
        ([node("DequantizeLinear", ["w", "x"], "d"), node("MatMul", ["x", "d"], "y")], [], "w"),
    ],
)
def test_malformed_graphs_are_refused_by_name(nodes: list, tensors: list, named: str) -> None:
    with pytest.raises(ArtifactError, match=named):
        coded_weights(model(nodes, [tensor("w", np.ones((4, 4)), "FLOAT"), *tensors]))


@pytest.mark.parametrize(
    ("scale", "zero_point", "attributes"),
    [
        (np.ones(3), None, {}),
        (np.ones((4, 2)), None, {}),
        (np.ones((4, 3)), None, {"axis": 1, "block_size": 2}),
        (np.ones(4), None, {"axis": 2}),
        (np.ones(4), None, {"axis": -3}),
        (np.ones((4, 4)), None, {"axis": 1, "block_size": -1}),
        (np.ones(4), np.zeros(2), {}),
    ],
)
def test_scales_that_do_not_fit_are_refused_by_name(scale: Any, zero_point: Any, attributes: dict) -> None:
    with pytest.raises(ArtifactError, match="'w"):
        coded_weights(coded(np.ones((4, 4)), scale, op="MatMul", zero_point=zero_point, **attributes))


def test_codes_dequantized_twice_are_refused() -> None:
    source = coded(np.ones((4, 4)), 1.0, op="MatMul")
    source.graph.node[1].input[1] = "again"
    source.graph.node.append(node("DequantizeLinear", ["w", "w.scale"], "again"))
    with pytest.raises(ArtifactError, match="twice"):
        coded_weights(source)


def test_random_damage_is_refused_or_read_never_worse() -> None:
    good = coded(sparse_codes(RNG, (4, 4, 1, 1), 4, axis=1), np.ones(4)).SerializeToString()
    for _ in range(500):
        damaged = bytearray(good)
        for position in RNG.integers(0, len(good), 3):
            damaged[position] = RNG.integers(0, 256)
        try:
            proto = onnx.ModelProto.FromString(bytes(damaged))
        except Exception:
            continue  # load_model's business
        try:
            for weight in coded_weights(proto):
                weight.values()
        except ArtifactError:
            pass


def test_a_tied_weight_is_one_weight_however_many_transposes_lead_to_it() -> None:
    tied = [
        node("DequantizeLinear", ["w.codes", "w.scale"], "w", axis=0),
        node("Transpose", ["w"], "t", perm=[1, 0]),
        node("Transpose", ["w"], "u", perm=[1, 0]),
        node("MatMul", ["x", "t"], "a"),
        node("MatMul", ["a", "u"], "y"),
    ]
    tensors = [tensor("w.codes", RNG.integers(-8, 8, (8, 8)), "INT4"), tensor("w.scale", SCALES, "FLOAT")]
    assert only(model(tied, tensors)).reduction_axis == 1
    both_ways = [*tied[:2], node("MatMul", ["x", "t"], "a"), node("MatMul", ["a", "w"], "y")]
    assert [weight.reduction_axis for weight in coded_weights(model(both_ways, tensors))] == [1, 0]


def test_a_head_shared_by_several_convolutions_is_one_weight() -> None:
    nodes = [
        node("DequantizeLinear", ["w.codes", "w.scale"], "w", axis=0),
        node("Conv", ["x", "w"], "a", pads=[1, 1, 1, 1]),
        node("Conv", ["a", "w"], "y", pads=[1, 1, 1, 1]),
    ]
    codes = RNG.integers(-8, 8, (8, 8, 3, 3))
    assert (
        only(model(nodes, [tensor("w.codes", codes, "INT4"), tensor("w.scale", SCALES, "FLOAT")], rank=4)).op == "Conv"
    )
