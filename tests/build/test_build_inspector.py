from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slope_compile.build import inspector as inspector_module
from slope_compile.build.inspector import parse_inspector, read_layers
from slope_compile.build.layers import Constant, EngineLayer, parse_layers

DATA = Path(__file__).parent / "data"


def layers(name: str) -> dict[str, EngineLayer]:
    return {layer.name: layer for layer in parse_inspector((DATA / name).read_text())}


def test_convolutions_of_tensorrt_10() -> None:
    found = layers("inspector10.json")
    assert len(found) == len(json.loads((DATA / "inspector10.json").read_text())["Layers"])
    conv = found["body.weight + body.q + body.conv + body.relu"]
    assert conv.kind == "CaskConvolution"
    assert conv.constants == (Constant("Weights", (73728,), "Int8"),)  # the bias is another thing
    assert conv.onnx == ("body.weight.dq", "body.conv", "body.relu")  # U+001E between them
    assert conv.tactic is not None and conv.tactic.startswith("sm80_xmma_fprop_sparse_conv_interleaved_i8i8")
    assert (conv.sparse_weights, conv.input_types) == (True, ("Int8",))
    reformat = next(layer for layer in found.values() if layer.kind == "Reformat")
    assert (reformat.onnx, reformat.constants, reformat.tactic) == ((), (), None)
    assert reformat.sparse_weights is None


def test_myelin_layers_of_tensorrt_10_name_their_constants() -> None:
    found = layers("inspector10.json")
    assert [c.dtype for c in found["__myl_CastMul_myl0_0"].constants] == ["Int4", "Half"]
    gemm = found["head.fc_myl0_1"]
    assert [c.name for c in gemm.constants] == ["head.bias _ ONNXTRT_Broadcast_6_constantHalf"]
    assert gemm.input_types == ("Half", "Half", "Float")


def test_tensorrt_11() -> None:
    found = layers("inspector11.json")
    conv = found["body.conv"]
    assert conv.onnx == ("body.conv", "body.weight.dq", "body.input.dq")  # U+001F between them
    assert conv.input_types == ("N/A due to dynamic shapes",)
    qkv = found["q.fc+k.fc+v.fc_myl0_3"]
    assert qkv.constants == (Constant("__mye77_dconst_myl0", (64, 192), "Int8"),)
    assert found["__myl_ReplCastMulCastFc_myl0_4"].tactic is None


def test_before_8_6_the_name_holds_the_nodes() -> None:
    row = {"Name": "a + b || c", "LayerType": "CaskConvolution", "Weights": {"Type": "Half", "Count": 8}}
    reformat = {"Name": "Reformatting CopyNode for Input Tensor 0 to a + b", "LayerType": "Reformat"}
    found = parse_inspector(json.dumps({"Layers": [row, reformat]}))
    assert [layer.onnx for layer in found] == [("a", "b", "c"), ()]


def test_constants_may_have_layers_of_their_own() -> None:
    row = {
        "Name": "w",
        "LayerType": "Constant",
        "Outputs": [{"Name": "w.out", "Dimensions": [4, 4], "Format/Datatype": "Int8"}],
    }
    (layer,) = parse_inspector(json.dumps([row]))  # a bare list is taken too
    assert layer.constants == (Constant("w.out", (4, 4), "Int8"),)


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", '"x"', "{}", '{"Layers": 3}', '{"Layers": ["only", "names"]}', '{"Layers": [{}]}',
     '{"Layers": [{"Name": 3}]}', "[" * 100_000],
)  # fmt: skip
def test_nothing_to_read(text: str) -> None:
    assert parse_inspector(text) == ()


@pytest.mark.parametrize(
    "damage",
    [
        {"Inputs": 3}, {"Inputs": [3, None]}, {"Inputs": [{"Dimensions": [1]}]}, {"Weights": 3},
        {"Inputs": [{"Name": "x_const", "Dimensions": "wide"}]}, {"Inputs": [{"Name": "x_const", "Dimensions": [1.5]}]},
        {"Inputs": [{"Name": "x_const", "Dimensions": [True]}]}, {"Weights": {"Type": 3, "Count": "many"}},
        {"Weights": {"Count": -1}}, {"Weights": {"Type": "Half", "Count": 0}}, {"TacticName": 3}, {"Metadata": [1]},
        {"HasSparseWeights": "yes"}, {"LayerType": None}, {"Outputs": {}},
    ],
)  # fmt: skip
def test_odd_values_cost_only_themselves(damage: dict[str, Any]) -> None:
    good = {"Name": "good", "LayerType": "x", "Weights": {"Type": "Int8", "Count": 4}, "Metadata": "[ONNX Layer: n]"}
    found = parse_inspector(json.dumps({"Layers": [{"Name": "odd", **damage}, good]}))
    assert [layer.name for layer in found] == ["odd", "good"]
    assert found[0].constants == ()
    assert found[1].constants == (Constant("Weights", (4,), "Int8"),)


def test_too_big(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DATA / "inspector10.json").read_text()
    monkeypatch.setattr(inspector_module, "MOST_BYTES", len(text) - 1)
    assert parse_inspector(text) == ()


def test_the_inspector_goes_before_the_log() -> None:
    log, text = (DATA / "rtx.txt").read_text(), (DATA / "inspector10.json").read_text()
    assert read_layers(log, text) == (parse_inspector(text), "engine inspector")
    assert read_layers(log, "") == (parse_layers(log), "build log")
    assert read_layers("", "{}") == ((), "nowhere")
