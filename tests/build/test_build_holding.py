from __future__ import annotations

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from slope_compile.build.holding import Wanted, declared_type, find_held, node_names
from slope_compile.build.inspector import parse_inspector
from slope_compile.build.layers import Constant, EngineLayer, parse_layers

DATA = Path(__file__).parent / "data"


def layer(name: str, constants: list[Constant], onnx: tuple[str, ...], inputs: tuple[str, ...] = ()) -> EngineLayer:
    return EngineLayer(name, "kgen", tuple(constants), inputs, (f"{name}.out",), None, onnx)


def test_real_rtx_log() -> None:
    layers = parse_layers((DATA / "rtx.txt").read_text())
    wanted = [
        Wanted("conv1.weight.codes", (64, 3, 3, 3), "INT8", ("conv1.weight.dq", "node_Conv_291")),
        Wanted("layer1.0.conv1.weight.codes", (64, 64, 3, 3), "INT4", ("layer1.0.conv1.weight.dq", "node_Conv_292")),
        Wanted("fc.weight.codes", (10, 512), "INT8", ("fc.weight.dq", "node_linear")),
    ]
    first, second, third = find_held(wanted, layers)
    assert all(held.declared and held.note is None for held in (first, second, third))
    assert first.constant == Constant("__mye2841_dconst_myl0", (64, 3, 3, 3), "Int8")
    assert second.layer is not None and second.layer.name == "__myl_CastMulCast_myl0_9"
    assert second.compute is not None and second.compute.name == "__myl_CorrMulAddRelu_myl0_10"
    assert third.layer is third.compute  # dequantized inside the GEMM
    assert [held.fused for held in (first, second, third)] == [False, False, True]
    assert second.fused_with == ("node__native_batch_norm_legit_no_training_1__0", "node_relu_1")
    assert third.fused_with == ()


def test_tensorrt_holds_half_where_int4_was_declared() -> None:
    layers = parse_layers((DATA / "trt10.txt").read_text())
    wanted = [
        Wanted("body.conv.weight.codes", (128, 64, 3, 3), "INT8", ("body.conv.weight.dq", "body.conv")),
        Wanted("head.weight.codes", (10, 128), "INT4", ("head.weight.dq", "head.fc")),
    ]
    conv, head = find_held(wanted, layers)
    assert conv.declared
    assert not head.declared
    assert head.note == "declared INT4, engine holds Half"
    assert head.constant is not None and head.constant.bytes == 2560


def test_no_constant_is_given_twice() -> None:
    """Two weights of one size, fused into one layer: each gets its own constant, the named one first."""
    both = layer(
        "k", [Constant("x_dconst", (4, 8), "Int4"), Constant("b.codes_constantInt4", (4, 8), "Int4")], ("a.dq", "b.dq")
    )
    a, b = find_held(
        [Wanted("a.codes", (8, 4), "INT4", ("a.dq", "a")), Wanted("b.codes", (8, 4), "INT4", ("b.dq", "b"))], [both]
    )
    assert a.constant is not None and a.constant.name == "x_dconst"
    assert b.constant is not None and b.constant.name == "b.codes_constantInt4"


def test_a_name_that_begins_alike_is_another_weight() -> None:
    other = layer("k", [Constant("a.codes2_constantInt4", (4,), "Int4")], ("other",))
    (held,) = find_held([Wanted("a.codes", (4,), "INT4", ("a.dq", "a"))], [other])
    assert held.constant is None


def test_the_declared_type_goes_first() -> None:
    """A float bias as long as the codes must not be taken for them."""
    one = layer("k", [Constant("bias_const", (8,), "Float"), Constant("w_dconst", (8,), "Int8")], ("w.dq", "op"))
    (held,) = find_held([Wanted("w.codes", (8,), "INT8", ("w.dq", "op"))], [one])
    assert held.constant is not None and held.constant.name == "w_dconst"
    assert held.declared


def test_padding() -> None:
    """Seen: the (3, 8) weight of a float Gemm is held as (8, 4)."""
    one = layer("k", [Constant("alpha_const", (1,), "Float"), Constant("w_dconst", (8, 4), "Float")], ("op",))
    (held,) = find_held([Wanted("w", (3, 8), "FLOAT", ("op",))], [one])
    assert held.constant is not None and held.constant.name == "w_dconst"
    assert held.declared
    assert held.note == "padded from 24 elements to 32"
    for shape in ((2, 8), (8, 40), (1, 8, 4), (32,)):
        other = layer("k", [Constant("w_dconst", shape, "Float")], ("op",))
        (held,) = find_held([Wanted("w", (3, 8), "FLOAT", ("op",))], [other])
        assert held.constant is None, shape


def test_nothing_found() -> None:
    (held,) = find_held([Wanted("w.codes", (8,), "INT4", ("w.dq", "op"))], [layer("k", [], ("op",))])
    assert (held.layer, held.constant, held.declared) == (None, None, False)
    assert held.compute is not None and held.compute.name == "k"
    assert held.note == "declared INT4; the engine's layer list shows no constant of 8 elements for it"


def test_compute_is_the_layer_that_reads_the_dequantized_weight() -> None:
    holder = layer("h", [Constant("w.codes_c", (8,), "Int4")], ("w.dq",))
    layers = [holder, layer("reformat", [], ("op",)), layer("conv", [], ("op",), ("x", "h.out"))]
    (held,) = find_held([Wanted("w.codes", (8,), "INT4", ("w.dq", "op"))], layers)
    assert held.compute is not None and held.compute.name == "conv"


def test_node_names() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w.codes", "s"], ["w"], name="w.dq"),
        helper.make_node("Relu", ["x"], ["r"], name="elsewhere"),
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("MatMul", ["r", "wt"], ["y"], name="mm"),
        helper.make_node("Add", ["y", "y"], ["z"], name="add"),
    ]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [info], [info])
    assert node_names(graph, "w.codes") == ("w.dq", "node_of_wt", "mm")
    assert node_names(graph, "nothing") == ()


def wanted(name: str, shape: tuple[int, ...], dtype: str, *more: str) -> Wanted:
    return Wanted(f"{name}.weight.codes", shape, dtype, (f"{name}.weight.dq", *more, name))


def test_inspector_of_tensorrt_10() -> None:
    layers = parse_inspector((DATA / "inspector10.json").read_text())
    stem, body, down, side, head = find_held(
        [
            Wanted("stem.weight.codes", (64, 3, 3, 3), "INT8", ("stem.weight.dq", "stem.conv")),
            Wanted("body.weight.codes", (128, 64, 3, 3), "INT8", ("body.weight.dq", "body.conv")),
            Wanted("down.weight.codes", (128, 128, 1, 1), "INT8", ("down.weight.dq", "down.conv")),
            Wanted("side.weight.codes", (64, 128, 1, 1), "INT8", ("side.weight.dq", "side.conv")),
            Wanted("head.weight.codes", (10, 128), "INT4", ("head.weight.dq", "head.turn", "head.fc")),
        ],
        layers,
    )
    assert all(held.declared for held in (stem, body, down, side, head))
    assert stem.note == "padded from 1728 elements to 2304"  # 3 channels to 4, of which only the count tells
    assert (body.fused, body.fused_with, body.note) == (True, ("body.relu",), None)
    assert down.layer is side.layer is not None
    assert [held.constant.bytes for held in (down, side) if held.constant] == [128 * 128, 64 * 128]  # each its share
    assert side.note == "one constant together with down.weight.codes"
    assert (head.fused, head.compute and head.compute.name) == (False, "head.fc_myl0_1")


def test_inspector_of_tensorrt_11() -> None:
    layers = parse_inspector((DATA / "inspector11.json").read_text())
    names = ("q", "k", "v")
    fcs = [Wanted(f"{n}.weight.codes", (64, 64), "INT8", (f"{n}.weight.dq", f"{n}.fc")) for n in names]
    mlp = Wanted("mlp.weight.codes", (256, 64), "INT4", ("mlp.weight.dq", "mlp.fc"))
    *qkv, held = find_held([*fcs, mlp], layers)
    assert {one.layer.name for one in qkv if one.layer} == {"q.fc+k.fc+v.fc_myl0_3"}
    assert all(one.fused and one.declared for one in qkv)
    assert (held.fused, held.fused_with) == (True, ("mlp.gelu",))


def test_a_shared_constant_must_hold_all_of_its_weights() -> None:
    fused = layer("a || b", [Constant("Weights", (24,), "Int8")], ("a.weight.dq", "a", "b.weight.dq", "b"))
    a, b = find_held([wanted("a", (2, 4), "INT8"), wanted("b", (2, 4), "INT8")], [fused])
    assert a.constant is b.constant is None


def test_a_tensor_that_two_operators_share() -> None:
    one = layer("k", [Constant("w.codes_constantInt8", (8, 8), "Int8")], ("w.dq", "first"), ("x",))
    first, second = find_held([Wanted("w.codes", (8, 8), "INT8", ("w.dq", "first"))] * 2, [one])
    assert first == second
    assert first.declared


def test_a_row_of_scales_is_not_the_matrix() -> None:
    """Seen beside a quantized MatMul: a folded row as long as a small matrix has numbers."""
    one = layer("k", [Constant("folded_dconst", (1, 64), "Int8")], ("w.dq", "op"))
    (held,) = find_held([Wanted("w.codes", (8, 8), "INT8", ("w.dq", "op"))], [one])
    assert held.constant is None


def test_a_layer_that_reads_nothing_computes_nothing() -> None:
    """Dequantized apart, moved, multiplied; the list names the operator in all three."""
    holder = EngineLayer("h", "kgen", (Constant("w_dconst", (8, 8), "Int4"),), (), ("h.out",), None, ("w.dq", "op"))
    move = EngineLayer("m", "kgen", (), ("h.out",), ("m.out",), None, (), ("Half",))
    epilogue = EngineLayer("e", "kgen", (), ("g.out",), ("y",), None, ("op",), ("Half",))
    gemm = EngineLayer("g", "gemm", (), ("x", "m.out"), ("g.out",), None, ("op", "add"), ("Half", "Half"))
    (held,) = find_held([Wanted("w.codes", (8, 8), "INT4", ("w.dq", "op"))], [holder, move, epilogue, gemm])
    assert (held.fused, held.compute and held.compute.name, held.fused_with) == (False, "g", ("add",))


def test_only_a_count_of_padded_channels() -> None:
    for count, fits in ((64 * 4 * 49, True), (64 * 36 * 49, False), (64 * 3 * 50, False), (70 * 4 * 49, False)):
        one = layer("k", [Constant("Weights", (count,), "Half")], ("op",))
        (held,) = find_held([Wanted("w", (64, 3, 7, 7), "FLOAT16", ("op",))], [one])
        assert (held.constant is not None) is fits, count


@pytest.mark.parametrize("order", [("to", "saturate"), ("saturate", "to")])
def test_a_cast_has_other_attributes_too(order: tuple[str, ...]) -> None:
    values = {"to": TensorProto.FLOAT16, "saturate": 1}  # 1 would be FLOAT
    cast = helper.make_node("Cast", ["w"], ["w16"], name="cast")
    cast.attribute.extend(helper.make_attribute(name, values[name]) for name in order)
    nodes = [cast, helper.make_node("MatMul", ["x", "w16"], ["y"], name="mm")]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    assert declared_type(helper.make_graph(nodes, "g", [info], [info]), "w", "FLOAT") == "FLOAT16"


def test_floats_declare_what_they_are_cast_to() -> None:
    cast = helper.make_node("Cast", ["w"], ["w16"], name="cast", to=TensorProto.FLOAT16)
    nodes = [cast, helper.make_node("MatMul", ["x", "w16"], ["y"], name="mm")]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [info], [info])
    assert declared_type(graph, "w", "FLOAT") == "FLOAT16"
    assert declared_type(graph, "nothing", "FLOAT") == "FLOAT"
    dequantize = helper.make_node("DequantizeLinear", ["w.codes", "s"], ["w"], name="w.dq")
    graph = helper.make_graph([dequantize, *nodes], "g", [info], [info])
    assert declared_type(graph, "w.codes", "INT4") == "INT4"
