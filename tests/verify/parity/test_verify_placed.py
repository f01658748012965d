from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from slope_compile.placement.passes.precision import SetPrecision
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.chain.places import Chain
from slope_compile.verify.parity.allowed import half_tensors, of_engine
from slope_compile.verify.parity.placed import check_placed
from slope_compile.verify.parity.tolerance import Tolerance, in_half
from slope_compile.verify.verdict import Check, Once, attempt

node = helper.make_node
Edit = Callable[[onnx.ModelProto], None]


def array(name: str, values: Any, kind: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values).astype(kind), name)


def quantized(value: str, name: str, zero_point: Sequence[str] = ("zero",)) -> list[Any]:
    parameters = [f"{name}.scale", *zero_point]
    return [
        node("QuantizeLinear", [value, *parameters], [f"{name}.q.out"], name=f"{name}.q"),
        node("DequantizeLinear", [f"{name}.q.out", *parameters], [f"{name}.dq.out"], name=f"{name}.dq"),
    ]


def network(activations: bool) -> onnx.ModelProto:
    """conv -> norm -> relu -> conv -> pool -> Gemm, at 4 bits; with `activations` what products read is quantized."""
    rng = np.random.default_rng(11)
    kind = np.int8 if activations else ml_dtypes.int4
    tensors, nodes = [array("zero", 0, np.int8)], []
    for name, shape in (("a.weight", (8, 3, 3, 3)), ("b.weight", (8, 8, 3, 3)), ("f.weight", (4, 8))):
        tensors += [
            array(f"{name}.codes", rng.integers(-7, 8, shape), kind),
            array(f"{name}.scale", rng.uniform(0.02, 0.05, shape[0])),
        ]
        nodes.append(node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [name], name=f"{name}.dq", axis=0))
    tensors += [array(f"n{i}", rng.uniform(0.5, 1.5, 8)) for i in range(4)] + [array("f.bias", rng.normal(size=4))]
    read = {"a": "x", "b": "r", "f": "v"}
    if activations:
        tensors += [array(f"{name}.input.scale", 0.02 + 0.01 * i) for i, name in enumerate("abf")]
    pieces = {
        "a": [
            node("Conv", ["IN", "a.weight"], ["c"], name="a", pads=[1] * 4),
            node("BatchNormalization", ["c", "n0", "n1", "n2", "n3"], ["n"], name="n"),
            node("Relu", ["n"], ["r"], name="r"),
        ],
        "b": [
            node("Conv", ["IN", "b.weight"], ["d"], name="b", pads=[1] * 4),
            node("GlobalAveragePool", ["d"], ["p"], name="p"),
            node("Flatten", ["p"], ["v"], name="v"),
        ],
        "f": [node("Gemm", ["IN", "f.weight", "f.bias"], ["y"], name="f", transB=1)],
    }
    for name, piece in pieces.items():
        if activations:
            nodes += quantized(read[name], f"{name}.input")
        piece[0].input[0] = f"{name}.input.dq.out" if activations else read[name]
        nodes += piece
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@dataclass
class Files:
    exported: Path
    placed: Path

    def check(self, feeds: int = 1) -> Check:
        rng = np.random.default_rng(5)
        some = [{"x": rng.standard_normal((6, 3, 8, 8)).astype(np.float32)} for _ in range(feeds)]
        loaded = (Once(lambda: coded_weights(self.exported)), Once(lambda: stored_quantizers(self.exported)))
        chain = Chain(self.exported, None, None, some)
        return attempt("parity.placed", lambda: check_placed(self.placed, chain, *loaded))


def files(folder: Path, precision: Any, activations: bool, edit: Edit | None = None) -> Files:
    made = Files(folder / "model.onnx", folder / "placed.onnx")
    onnx.save(network(activations), made.exported)
    changed = ir.from_proto(network(activations))
    SetPrecision(precision)(changed)
    placed = ir.to_proto(changed)
    if edit is not None:
        edit(placed)
    onnx.save(placed, made.placed)
    return made


def change(name: str, index: int, by: Callable[[Any], Any]) -> Edit:
    """Change one element of a constant."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = [one for one in model.graph.initializer if one.name == name]
        values = numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[index] = by(values.reshape(-1)[index])
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return edit


def find(model: onnx.ModelProto, name: str) -> Any:
    return next(one for one in model.graph.node if one.name == name)


def without(name: str) -> Edit:
    """Take a node out."""

    def edit(model: onnx.ModelProto) -> None:
        gone = find(model, name)
        for one in model.graph.node:
            for index, value in enumerate(one.input):
                if value == gone.output[0]:
                    one.input[index] = gone.input[0]
        model.graph.node.remove(gone)

    return edit


def axis(model: onnx.ModelProto) -> None:
    find(model, "b.weight.dq").attribute[0].i = 1


def square(model: onnx.ModelProto) -> None:
    """Sum over the other axis of a square matrix."""
    find(model, "f").attribute[0].i = 0


@pytest.mark.parametrize("activations", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_network_passes(tmp_path: Path, precision: str, activations: bool) -> None:
    check = files(tmp_path, precision, activations).check(feeds=2)
    assert check.status == "pass", check.detail
    assert check.figures["weights"] == 3
    assert check.figures["quantizers"] == (3 if activations else 0)
    assert check.figures["relative"] <= check.figures["tolerance"] / 3
    if precision == "fp32" or activations:  # between INT8 products nothing is half
        assert check.figures["precision"] == "fp32"
        assert check.figures["relative"] < 1e-6
    else:
        assert check.figures["half_tensors"] > 8
        assert check.figures["relative"] > 1e-5


WRONG: dict[str, tuple[Edit, str]] = {
    "code": (change("b.weight.codes", 7, lambda c: np.int8(c) - 1 if c > -7 else c + 1), r"b\.weight: 1 of 576 values"),
    "scale": (change("a.weight.scale", 3, lambda s: np.nextafter(s, np.float32(1))), r"a\.weight: \d+ of 216 values"),
    "axis": (axis, r"b\.weight: \d+ of 576 values"),
    "norm": (change("n3", 2, lambda v: v * 2), "differs by|no rounding"),
    "bias": (change("f.bias", 0, lambda v: v + np.float16(0.5)), "differs by"),
    "relu": (without("r"), "differs by|no rounding"),
    "nan": (change("f.bias", 1, lambda v: v * np.nan), r"output 'y' has \d+ NaN or infinite values"),
    "infinite": (change("f.bias", 1, lambda v: np.inf), r"output 'y' has \d+ NaN"),
}


@pytest.mark.parametrize(("precision", "activations"), [("fp16", False), ("fp32", True)], ids=["half", "int8"])
@pytest.mark.parametrize("what", WRONG)
def test_another_network_fails(tmp_path: Path, what: str, precision: str, activations: bool) -> None:
    edit, message = WRONG[what]
    check = files(tmp_path, precision, activations, edit).check()
    assert check.status == "fail"
    assert re.search(message, check.detail), check.detail


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("r"), r"b\.input: \d+ of 3072 integers are no rounding of the exported file's"),
        (change("b.input.scale", 0, lambda s: s * np.float32(1.001)), r"b\.input: step .* exported 0\.0"),
        (without("p"), "."),
    ],
    ids=["relu", "step", "pool"],
)
def test_quantizers_are_compared_segment_by_segment(tmp_path: Path, edit: Edit, message: str) -> None:
    check = files(tmp_path, "fp16", True, edit).check()
    assert check.status == "fail"
    assert re.search(message, check.detail), check.detail


def test_a_quantizer_more_or_less_fails(tmp_path: Path) -> None:
    def drop(model: onnx.ModelProto) -> None:
        without("b.input.dq")(model)
        without("b.input.q")(model)

    check = files(tmp_path, "fp32", True, drop).check()
    assert check.status == "fail"
    assert "b.input: quantizes 'b.input.q.out' in one of the files only" in check.detail


def test_other_weights_fail(tmp_path: Path) -> None:
    check = files(tmp_path, "fp32", False, without("f")).check()
    assert check.status == "fail"
    assert "multiply with other weights, or in another order: f.weight" in check.detail


def test_bfloat16_outputs_are_not_compared_but_its_weights_are(tmp_path: Path) -> None:
    check = files(tmp_path, "bf16", False).check()
    assert check.status == "not checked"
    assert check.detail.startswith("3 weights of placed.onnx and 0 quantizers are the exported ones")
    assert "no BFLOAT16" in check.detail
    edit, message = WRONG["code"]
    wrong = files(tmp_path, "bf16", False, edit).check()
    assert wrong.status == "fail"
    assert re.search(message, wrong.detail)


@pytest.mark.parametrize(
    ("name", "layer", "operator", "cause"),
    [
        ("f.bias", "f", "Gemm", "bias: the last bits differ"),
        ("a.weight.scale", "a", "Conv", "weight: the last bits differ"),
    ],
)
def test_what_differs_by_its_bits_only_is_named_like_what_outputs_show(
    tmp_path: Path, name: str, layer: str, operator: str, cause: str
) -> None:
    check = files(tmp_path, "fp32", False, change(name, 0, lambda v: np.nextafter(v, np.float32(1)))).check()
    found = check.figures["diverges"]
    assert check.status == "fail" and (found["layer"], found["operator"]) == (layer, operator)
    assert found["cause"].startswith(cause) and f"({cause}" in check.detail
    assert 0 < found["error"] < 1e-6 and found["allowed"] == 0
    assert found["reference"]["shape"] == found["tested"]["shape"] and found["command"] is None


def test_padding_must_be_zero(tmp_path: Path) -> None:
    made = files(tmp_path, "fp32", False)

    def pad(last: int) -> Check:
        model = network(False)
        codes = next(t for t in model.graph.initializer if t.name == "f.weight.codes")
        stored = numpy_helper.to_array(codes).astype(np.int8)
        padded = np.concatenate([stored, np.full((4, 2), last, np.int8)], axis=1)
        codes.CopyFrom(array("f.weight.codes", padded, ml_dtypes.int4))
        model.graph.initializer.append(array("pads", [0, 0, 0, 2], np.int64))
        pad_node = node("Pad", ["v", "pads"], ["w"], name="pad")
        model.graph.node.insert(len(model.graph.node) - 1, pad_node)
        find(model, "f").input[0] = "w"
        onnx.save(model, made.placed)
        return made.check()

    assert pad(0).status == "pass"
    wrong = pad(1)
    assert wrong.status == "fail"
    assert "what was added is not 0" in wrong.detail


def test_what_is_not_there(tmp_path: Path) -> None:
    made = files(tmp_path, "fp32", False)
    nothing = Once(lambda: [])
    unbuilt = attempt("p", lambda: check_placed(None, Chain(made.exported, None, None, []), nothing, nothing))
    assert (unbuilt.status, unbuilt.detail) == ("not checked", "nothing was built")
    assert made.check(feeds=0).status == "not checked"
    made.placed.unlink()
    assert made.check().detail == "placed.onnx is missing"
    made.placed.write_bytes(b"\x08\x0a broken")
    assert made.check().status == "fail"


def test_half_precision_widens_what_an_engine_may_do(tmp_path: Path) -> None:
    made = files(tmp_path, "fp16", False)
    precision, tensors = half_tensors(made.placed)
    assert (precision, tensors) == ("fp16", 11)
    weights = coded_weights(made.exported)
    narrow = of_engine(made.exported, weights, [], [])
    wide = of_engine(made.exported, weights, [], [], made.placed)
    assert wide.relative == pytest.approx(narrow.relative + 2 * 2**-11 * 11**0.5)
    assert in_half(Tolerance(0.0, "none"), 4, "bf16").relative == 2 * 2**-8 * 2
    assert half_tensors(made.exported) == ("fp32", 0)
