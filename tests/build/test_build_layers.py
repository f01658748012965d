from __future__ import annotations

from pathlib import Path

import pytest

from slope_compile.build.layers import Constant, EngineLayer, parse_layers, parse_sparsity

DATA = Path(__file__).parent / "data"


def layers(name: str) -> dict[str, EngineLayer]:
    return {layer.name: layer for layer in parse_layers((DATA / name).read_text())}


def test_rtx() -> None:
    found = layers("rtx.txt")
    assert list(found) == [
        "__mye1440_0_myl0_0", "__myl_CastMulCast_myl0_6", "__myl_CorrMulAddRelu_myl0_8", "__myl_CastMulCast_myl0_9",
        "__myl_CorrMulAddRelu_myl0_10", "node_Conv_310_myl0_54", "__myl_CastMulCastFc_myl0_56", "__myl_Add_myl0_57",
    ]  # fmt: skip
    first = found["__mye1440_0_myl0_0"]
    assert (first.kind, first.constants, first.tactic, first.onnx) == ("shape_call", (), None, ())
    dequantize = found["__myl_CastMulCast_myl0_9"]
    assert dequantize.kind == "kgen"
    assert dequantize.constants == (
        Constant("__mye2286_dconst_myl0", (64, 1, 1, 1), "Float"),
        Constant("layer1.0.conv1.weight.codes_constantInt4_myl0", (64, 64, 3, 3), "Int4"),
    )
    assert dequantize.constants[1].bytes == 64 * 64 * 9 // 2
    assert dequantize.tactic == "__myl_CastMulCast_0xd81728c8c15676527762c28841f9b41c"
    assert dequantize.outputs == ("__myln_k_arg__bb1_19_myl0",)
    assert dequantize.onnx == ("layer1.0.conv1.weight.dq",)
    conv = found["__myl_CorrMulAddRelu_myl0_10"]
    assert "__myln_k_arg__bb1_19_myl0" in conv.inputs
    assert conv.tactic is None  # chosen at run time
    assert conv.onnx[0] == "node_Conv_292"
    assert found["node_Conv_310_myl0_54"].tactic is None  # so is what stands in for a kernel
    gemm = found["__myl_CastMulCastFc_myl0_56"]
    assert gemm.constants[1] == Constant("__mye2252_dconst_myl0", (512, 10), "Int8")
    assert gemm.onnx == ("fc.weight.dq", "node_linear")


def test_tensorrt_10() -> None:
    found = layers("trt10.txt")
    conv = found["body.conv + body.relu"]
    assert conv.kind == "CaskConvolution"
    assert conv.constants == (Constant("Weights", (73728,), "Int8"),)
    assert conv.tactic == "sm80_xmma_fprop_sparse_conv_interleaved_i8i8_i8i32_f32_tilesize128x128x128"
    assert conv.onnx == ("body.conv.weight.dq", "body.conv", "body.relu[0]")
    assert conv.sparse_weights is True
    assert found["Reformatting CopyNode for Input Tensor 0 to stem.conv"].onnx == ()
    gemm = found["head.fc_myl9_4"]
    assert gemm.inputs[0] == "pooled'.1_4"
    assert [c.name for c in gemm.constants] == ["__mye595_dconst", "head.bias _ ONNXTRT_Broadcast_6_constantHalf"]
    assert gemm.constants[0] == Constant("__mye595_dconst", (128, 10), "Half")


def test_worded_types() -> None:
    line = (
        "Name: a, LayerType: gemm, Inputs: [ { Name: w_const, Dimensions: [2,3], Format/Datatype: "
        "Two wide channel vectorized row major FP16 format }], Outputs: [], TacticName: t, StreamId: 0, Metadata: "
    )
    (layer,) = parse_layers(f"Layers:\n{line}\n")
    assert layer.constants == (Constant("w_const", (2, 3), "Half"),)
    assert layer.constants[0].bytes == 12


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        ("__mye595_dconst", True), ("__mye5778dconst_myl0", True), ("__mye34841_const_myl0", True),
        ("__mye16709_const-lit-in_myl0", True), ("head.bias _ ONNXTRT_Broadcast_6_constantHalf", True),
        ("a.codes_constantInt4_myl0", True), ("constellation", False), ("reconstruct.out", False), ("x", False),
    ],
)  # fmt: skip
def test_only_myelin_s_names_are_constants(name: str, constant: bool) -> None:
    line = f"Name: a, LayerType: k, Inputs: [ {{ Name: {name}, Dimensions: [4], Format/Datatype: Half }}], "
    (layer,) = parse_layers(f"Layers:\n{line}Outputs: [], TacticName: t, StreamId: 0, Metadata: \n")
    assert bool(layer.constants) is constant
    assert layer.input_types == (() if constant else ("Half",))


@pytest.mark.parametrize("between", ["", "\x1e", "\x1f", " "])
def test_node_names_are_separated_in_several_ways(between: str) -> None:
    line = "Name: a, LayerType: x, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
    (layer,) = parse_layers(f"Layers:\n{line}[ONNX Layer: one]{between}[ONNX Layer: two[0]]\n")
    assert layer.onnx == ("one", "two[0]")


def test_a_list_without_metadata() -> None:
    """TensorRT 8.5 and before."""
    line = "Name: {}, LayerType: {}, Inputs: [], Outputs: [], TacticName: t, TacticValue: 0x1"
    one, two = parse_layers(
        f"Layers:\n{line.format('a + b || c', 'CaskConvolution')}\n{line.format('for a + b', 'Reformat')}\n"
    )
    assert (one.onnx, two.onnx) == (("a", "b", "c"), ())


def test_the_last_list_counts() -> None:
    one = "Name: a, LayerType: x, Inputs: [], Outputs: [], TacticName: , StreamId: 0, Metadata: "
    log = f"[V] Layers:\n{one}\n{one}\n\n[V] Layers:\n{one}\nName of nothing\n{one}\n"
    assert len(parse_layers(log)) == 1


@pytest.mark.parametrize("log", ["", "VERBOSE: nothing", "Layers:", "Layers:\n\n"])
def test_no_list(log: str) -> None:
    assert parse_layers(log) == ()


def test_unknown_type_has_no_bytes() -> None:
    assert Constant("c", (3,), "Int3").bytes is None
    assert Constant("c", (3,), "Int4").bytes == 2


def test_sparsity_new_wording() -> None:
    """Printed per subgraph and for the whole: the largest counts are the whole's."""
    found = parse_sparsity((DATA / "trt10.txt").read_text())
    assert (found.eligible, found.chosen) == (3, 1)
    assert found.chosen_names == {"body.conv + body.relu"}
    assert found.eligible_names == {"stem.conv", "body.conv + body.relu", "head.fc"}


def test_sparsity_old_wording() -> None:
    log = (
        "[I] [TRT] (Sparsity) Layers eligible for sparse math: conv1, conv2, conv3\n"
        "[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: conv2, conv3\n"
    )
    found = parse_sparsity(log)
    assert (found.eligible, found.chosen, found.chosen_names) == (3, 2, {"conv2", "conv3"})


def test_sparsity_without_names() -> None:
    log = (
        "INFO: (Sparsity) Found 39 layer(s) eligible to use sparse tactics\n"
        "INFO: (Sparsity) Chose 0 layer(s) using sparse tactics\n"
    )
    found = parse_sparsity(log)
    assert (found.eligible, found.chosen, found.chosen_names) == (39, 0, frozenset())


def test_sparsity_old_wording_none_picked() -> None:
    log = (
        "(Sparsity) Layers eligible for sparse math: a\n"
        "(Sparsity) TRT inference plan picked sparse implementation for layers:\n"
    )
    found = parse_sparsity(log)
    assert (found.eligible, found.chosen) == (1, 0)


def test_no_sparsity_lines() -> None:
    assert parse_sparsity("INFO: nothing") == parse_sparsity("")
    assert parse_sparsity("").eligible is None
