from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from placement_models import situation
from qdq_graphs import model as graph_of
from qdq_graphs import node, sparse_codes, tensor

from slope_compile.errors import BackendError
from slope_compile.placement.choose import Place, choose_places
from slope_compile.placement.situation import Situation
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(3)


def gemm(path: Path, rows: int = 1, k: int = 1024, n: int = 1024, sparse: bool = False, codes: Any = None) -> Path:
    """x [batch, rows, K] @ w [K, N], 4-bit codes."""
    if codes is None:
        codes = sparse_codes(RNG, (k, n), 4, 0) if sparse else RNG.integers(-8, 8, (k, n))
    return weighted(path, "MatMul", codes, ["batch", rows, k], ["batch", rows, n], axis=1)


def conv(
    path: Path, channels: int = 256, side: int = 14, groups: int = 1, sparse: bool = False, int8: bool = False
) -> Path:
    """A 3x3 convolution on side x side positions; `int8`: between quantizers."""
    shape = (channels, channels // groups, 3, 3)
    codes = sparse_codes(RNG, shape, 4, 1) if sparse else RNG.integers(-8, 8, shape)
    x = ["batch", channels, side, side]
    return weighted(path, "Conv", codes, x, x, axis=0, int8=int8, group=groups, pads=[1, 1, 1, 1])


def weighted(
    path: Path, op: str, codes: Any, x: list[Any], y: list[Any], axis: int, int8: bool = False, **attributes: Any
) -> Path:
    tensors = [tensor("w.codes", codes, "INT4"), tensor("w.scale", np.full(codes.shape[axis], 0.01), "FLOAT")]
    nodes = [node("DequantizeLinear", ["w.codes", "w.scale"], "w.weight", axis=axis)]
    tensors[0].name = "w.weight.codes"
    nodes[0].input[0] = "w.weight.codes"
    if int8:
        tensors += [tensor("s", 0.1, "FLOAT"), tensor("z", 0, "INT8")]
        nodes += [node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "d")]
        nodes += [node(op, ["d", "w.weight"], "c", **attributes), node("Relu", ["c"], "r")]
        nodes += [node("QuantizeLinear", ["r", "s", "z"], "p"), node("DequantizeLinear", ["p", "s", "z"], "y")]
    else:
        nodes.append(node(op, ["x", "w.weight"], "y", **attributes))
    proto = graph_of(nodes, tensors, opset=21)
    proto.ir_version = 10
    for values, dims in ((proto.graph.input, x), (proto.graph.output, y)):
        values[0].CopyFrom(helper.make_tensor_value_info(values[0].name, TensorProto.FLOAT, dims))
    for name, dims in (("d", x), ("c", y)) if int8 else ():
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    onnx.save(proto, path)
    return path


def choose(model: Path, one: Situation, **overrides: Any) -> Place:
    (place,) = choose_places(model, coded_weights(model), replace(one, overrides=overrides))
    return place


MAKERS: dict[str, Any] = {
    "conv": conv,
    "sparse conv": lambda path: conv(path, sparse=True),
    "small sparse conv": lambda path: conv(path, channels=16, side=32, sparse=True),
    "int8 conv": lambda path: conv(path, int8=True),
    "sparse int8 conv": lambda path: conv(path, sparse=True, int8=True),
    "grouped int8 conv": lambda path: conv(path, groups=32, sparse=True, int8=True),
    "head": gemm,
    "tokens": lambda path: gemm(path, rows=197),
    "sparse tokens": lambda path: gemm(path, rows=197, sparse=True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("choose")
    return {name: make(folder / f"{number}.onnx") for number, (name, make) in enumerate(MAKERS.items())}


# What the cost model chooses, held here so that a change of it is seen: target, backend, batch -> placement.
TENSORRT_1, TENSORRT_64 = ("a100", "tensorrt", 1), ("a100", "tensorrt", 64)
ORIN_1, ORIN_64 = ("orin", "tensorrt", 1), ("orin", "tensorrt", 64)
RTX_1, RTX_64 = ("rtx-ada", "tensorrt-rtx", 1), ("rtx-ada", "tensorrt-rtx", 64)
GOLDEN = {
    "conv": ["int8-weight", "int8-weight", "int8-weight", "int8-weight", "int4-storage", "int4-storage"],
    "sparse conv": ["sparse-fp16", "sparse-fp16", "sparse-fp16", "sparse-fp16", "int4-storage", "int4-storage"],
    "small sparse conv": ["int8-weight"] * 4 + ["int4-storage"] * 2,
    "int8 conv": ["int8"] * 6,
    "sparse int8 conv": ["sparse-int8"] * 6,
    "grouped int8 conv": ["int8"] * 6,
    "head": ["int4-weight"] * 5 + ["int8-weight"],
    "tokens": ["int8-weight", "int8-weight", "int4-weight", "int8-weight", "int8-weight", "int8-weight"],
    "sparse tokens": ["sparse-fp16", "sparse-fp16", "sparse-fp16", "sparse-fp16", "int8-weight", "int8-weight"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_choices(name: str, models: dict[str, Path]) -> None:
    found = []
    for target, backend, batch in (TENSORRT_1, TENSORRT_64, ORIN_1, ORIN_64, RTX_1, RTX_64):
        place = choose(models[name], situation(target, backend, batch=batch))
        found.append(place.placement)
        assert place.costs[place.placement] <= 1.06 * min(
            seconds for other, seconds in place.costs.items() if other not in ("float", "sparse-fp16")
        )
        assert place.reason and "float" in place.costs
    assert found == GOLDEN[name]


def test_reasons_speak_plainly(models: dict[str, Path]) -> None:
    head = choose(models["head"], situation(batch=1)).reason
    assert "memory bound at batch 1: 0.565 MB moved, 2.1 MB with FLOAT16 constants" in head
    plain = choose(models["conv"], situation()).reason
    assert "no int4-storage: TensorRT has no INT4 convolution" in plain
    assert "constants may be faster, and take 2 times the bytes: build.placement `float`" in plain
    sparse = choose(models["sparse conv"], situation()).reason
    assert "rounding to FLOAT16 moves a weight by at most" in sparse and "ulp" in sparse
    small = choose(models["small sparse conv"], situation(), w="sparse-fp16").reason
    assert "asked for by build.placement 'w'" in small
    assert "sparse kernels are not likely: 144 products a sum and 16 output channels" in small
    grouped = choose(models["grouped int8 conv"], situation()).reason
    assert "no sparse-int8: a convolution of 32 groups gets no sparse kernel" in grouped
    assert "compute bound at batch 64" in choose(models["sparse int8 conv"], situation("orin", batch=64)).reason


def test_the_last_override_that_fits_wins(models: dict[str, Path]) -> None:
    one = situation()
    assert choose(models["head"], one, **{"*": "float", "w": "int8-weight"}).placement == "int8-weight"
    assert choose(models["head"], one, **{"w": "int8-weight", "w*": "float"}).placement == "float"
    assert choose(models["head"], replace(one, precision="fp32"), w="float").container == "FLOAT"
    assert choose(models["head"], one, w="float").container == "FLOAT16"


@pytest.mark.parametrize(
    ("name", "one", "overrides", "message"),
    [
        ("head", situation(), {"v": "float"}, "'v' fits no layer .* Known: w"),
        ("head", situation(), {"W": "float", "w": "float"}, "'W' fits no layer"),
        ("conv", situation(), {"w": "int4-storage"}, "has no INT4 convolution .*#178.*Possible there: int8-weight"),
        ("conv", situation(), {"w": "int4-weight"}, "no INT4 Conv that is fused"),
        ("conv", situation(), {"w": "sparse-fp16"}, "codes are not 2:4"),
        ("conv", situation(), {"w": "sparse-int8"}, "activation is not quantized"),
        ("int8 conv", situation(), {"w": "int8-weight"}, "the product is too"),
        ("sparse int8 conv", situation(), {"w": "sparse-fp16"}, "multiplies INT8 with INT8"),
        ("sparse conv", situation(precision="fp32"), {"w": "sparse-fp16"}, "activations are FP32"),
        ("sparse conv", situation(backend="tensorrt-rtx"), {"w": "sparse-fp16"}, "says of no kernel"),
        ("sparse conv", situation("rtx-turing"), {"w": "sparse-fp16"}, "no sparse tensor cores"),
        ("head", situation("rtx-turing"), {"w": "int4-weight"}, "takes no INT4 weights"),
        ("head", situation("rtx-turing", "tensorrt-rtx"), {"w": "int8-weight"}, "no INT8 weights in a matrix product"),
    ],
)
def test_an_impossible_override_is_refused_with_the_rule(
    name: str, one: Situation, overrides: dict[str, Any], message: str, models: dict[str, Path]
) -> None:
    with pytest.raises(BackendError, match=message):
        choose(models[name], one, **overrides)


def test_values_beyond_fp16_keep_their_scales(tmp_path: Path) -> None:
    model = conv(tmp_path / "m.onnx", sparse=True)
    proto = onnx.load(model)
    (scale,) = [t for t in proto.graph.initializer if t.name == "w.scale"]
    scale.CopyFrom(tensor("w.scale", np.full(256, 3e4), "FLOAT"))
    onnx.save(proto, model)
    assert choose(model, situation()).placement == "int8-weight"
    with pytest.raises(BackendError, match=r"its values are beyond FLOAT16.*Possible there: int8-weight, float"):
        choose(model, situation(), w="sparse-fp16")


def test_where_nothing_holds_the_codes_they_become_constants(tmp_path: Path) -> None:
    """Turing with TensorRT-RTX takes neither INT4 nor INT8 weights in a matrix product."""
    place = choose(gemm(tmp_path / "m.onnx"), situation("rtx-turing", "tensorrt-rtx"))
    assert (place.placement, place.container) == ("float", "FLOAT16")
    assert "no int4-weight: RTX 20, T4 takes no INT4 weights" in place.reason


def test_uses_of_one_tensor_share_a_placement(tmp_path: Path) -> None:
    """One 4-bit matrix, tied: a product over tokens and one that is transposed."""
    tensors = [tensor("w.codes", RNG.integers(-8, 8, (256, 256)), "INT4"), tensor("w.scale", 0.01, "FLOAT")]
    nodes = [
        node("DequantizeLinear", ["w.codes", "w.scale"], "w"),
        node("MatMul", ["x", "w"], "a"),
        node("Transpose", ["w"], "t", perm=[1, 0]),
        node("Reshape", ["t", "shape"], "r"),
        node("Conv", ["b", "r"], "y"),
    ]
    nodes.insert(2, node("Reshape", ["a", "image"], "b"))
    tensors += [tensor("shape", 0, "FLOAT"), tensor("image", 0, "FLOAT")]
    for one, dims in zip(tensors[2:], ([256, 256, 1, 1], [-1, 256, 4, 4]), strict=True):
        one.CopyFrom(onnx.numpy_helper.from_array(np.array(dims, np.int64), one.name))
    proto = graph_of(nodes, tensors, opset=21)
    proto.ir_version = 10
    proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 256]))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    weights = coded_weights(path)
    assert [weight.op for weight in weights] == ["MatMul", "Conv"]
    places = choose_places(path, weights, situation())
    assert [place.placement for place in places] == ["int8-weight"] * 2
    assert places[0].costs == places[1].costs


def test_a_tied_matrix_read_both_ways_has_no_blocks(tmp_path: Path) -> None:
    tensors = [tensor("w.codes", RNG.integers(-8, 8, (256, 256)), "INT4"), tensor("w.scale", 0.01, "FLOAT")]
    nodes = [node("DequantizeLinear", ["w.codes", "w.scale"], "w"), node("Transpose", ["w"], "t", perm=[1, 0])]
    nodes += [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "t"], "y")]
    proto = graph_of(nodes, tensors, opset=21)
    proto.ir_version = 10
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    weights = coded_weights(path)
    assert len(weights) == 2
    assert {place.placement for place in choose_places(path, weights, situation())} == {"int8-weight"}
    with pytest.raises(BackendError, match="'w' asks for int4-weight for 'w', but its operators sum"):
        choose_places(path, weights, replace(situation(), overrides={"w": "int4-weight"}))
