from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from slope_compile.errors import BackendError
from slope_compile.placement.passes.precision import SetPrecision, resolve_precision
from slope_compile.placement.rounding import exact_values
from slope_compile.qdq.reader import coded_weights
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.target import find_target

RNG = np.random.default_rng(3)
HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
node = helper.make_node


def constant(name: str, array: Any, kind: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array).astype(kind), name)


def weight(name: str, shape: tuple[int, ...], kind: Any = np.int8, **attributes: int) -> tuple[list[TensorProto], Any]:
    axis, block = attributes.get("axis", 0), attributes.get("block_size", 0)
    scales = tuple(n // block if a == axis else n for a, n in enumerate(shape)) if block else (shape[axis],)
    tensors = [
        constant(f"{name}.codes", RNG.integers(-7, 8, shape), kind),
        constant(f"{name}.scale", RNG.uniform(0.01, 0.02, scales)),
    ]
    return tensors, node("DequantizeLinear", [t.name for t in tensors], [name], name=f"{name}.dq", **attributes)


def quantized(value: str, out: str) -> list[Any]:
    """Q/DQ with the scale `s` and the zero point `z`."""
    return [
        node("QuantizeLinear", [value, "s", "z"], [f"{out}.q"], name=f"{out}.q"),
        node("DequantizeLinear", [f"{out}.q", "s", "z"], [out], name=f"{out}.dq"),
    ]


STEP = [constant("s", 0.05), constant("z", 0, np.int8)]


def graph(
    nodes: list[Any], tensors: list[TensorProto], rank: int = 4, opset: int = 21, width: int = 8, out: int = 0
) -> onnx.ModelProto:
    dims: list[Any] = ["batch", width, 6, 6][:rank]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (out or rank))],
        tensors,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def halved(model: onnx.ModelProto, precision: Any = "fp16") -> onnx.ModelProto:
    changed = ir.from_proto(model)
    SetPrecision(precision)(changed)
    proto = ir.to_proto(changed)
    onnx.checker.check_model(proto)
    return proto


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Value -> element type, as ONNX's own inference says."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    return found | {t.name: t.data_type for t in inferred.initializer}


def casts(model: onnx.ModelProto) -> list[str]:
    return sorted(n.output[0] for n in model.graph.node if n.op_type == "Cast")


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def weight_only() -> onnx.ModelProto:
    tensors, dequantize = weight("w", (8, 8, 3, 3))
    nodes = [
        dequantize,
        node("Conv", ["x", "w", "b"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"], name="relu"),
        node("Add", ["r", "k"], ["y"], name="add"),
    ]
    return graph(nodes, [*tensors, constant("b", RNG.normal(size=8)), constant("k", 0.5)])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_weight_only_graph_is_half_between_float32_ends(precision: Any) -> None:
    source = weight_only()
    model = halved(source, precision)
    found = types(model)
    assert found["x"] == found["y"] == found["w"] == found["w.scale"] == TensorProto.FLOAT
    assert all(found[name] == HALF[precision] for name in ("c", "r", "b", "k", f"w.{precision}", f"x.{precision}"))
    assert casts(model) == sorted([f"w.{precision}", f"x.{precision}", "y"])
    (before,), (after,) = coded_weights(source), coded_weights(model)
    assert after.value_dtype == ("FLOAT16" if precision == "fp16" else "BFLOAT16")
    assert np.array_equal(exact_values(after), before.values())
    assert model.opset_import[0].version == (21 if precision == "fp16" else 22)


def test_fp32_changes_nothing() -> None:
    model = ir.from_proto(weight_only())
    before = ir.to_proto(model).SerializeToString()
    assert not SetPrecision("fp32")(model).modified
    assert ir.to_proto(model).SerializeToString() == before


def test_outputs_are_near() -> None:
    model = weight_only()
    x = RNG.normal(size=(2, 8, 6, 6)).astype(np.float32)
    expected, found = run(model, x), run(halved(model), x)
    assert found.dtype == np.float32
    assert np.abs(expected - found).max() < 3 * 2**-11 * np.abs(expected).max()
    assert not np.array_equal(expected, found)


def residual(after: str) -> onnx.ModelProto:
    """x -> Q/DQ -> conv -> norm -> + shortcut -> relu -> `after`: Q/DQ -> conv, or conv -> relu -> Q/DQ."""
    tensors, dequantize = weight("w", (8, 8, 3, 3))
    more, last = weight("v", (8, 8, 3, 3))
    norm = [constant(f"n{i}", np.full(8, 0.5 + i)) for i in range(4)]
    nodes = [
        dequantize,
        last,
        *quantized("x", "q"),
        node("Conv", ["q", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "n0", "n1", "n2", "n3"], ["b"], name="norm"),
        node("Add", ["b", "q"], ["a"], name="add"),
        node("Relu", ["a"], ["r"], name="relu"),
        *(quantized("r", "p") if after == "int8" else []),
        node("Conv", ["p" if after == "int8" else "r", "v"], ["d"], name="last", pads=[1, 1, 1, 1]),
        node("Relu", ["d"], ["e"], name="relu2"),
        *quantized("e", "y"),
    ]
    return graph(nodes, [*tensors, *more, *norm, *STEP])


def test_nothing_is_cast_where_all_products_are_int8() -> None:
    model = halved(residual("int8"))
    assert casts(model) == []
    assert set(types(model).values()) <= {TensorProto.FLOAT, TensorProto.INT8}


def test_an_int8_product_keeps_its_norm_its_sum_and_its_activation() -> None:
    model = halved(residual("float"))
    found = types(model)
    assert casts(model) == ["e.fp32", "r.fp16", "v.fp16"]
    assert all(found[name] == TensorProto.FLOAT for name in ("c", "b", "a", "r", "q", "w", "v", "y"))
    assert found["d"] == found["e"] == TensorProto.FLOAT16
    inputs = {n.name: list(n.input) for n in model.graph.node}
    assert inputs["conv"] == ["q", "w"]
    assert inputs["y.q"][0] == "e.fp32"


def test_attention_between_int8_products_is_half_and_what_moves_their_factors_is_not() -> None:
    tensors, dequantize = weight("w", (8, 8))
    nodes = [
        dequantize,
        *quantized("x", "q"),
        node("Transpose", ["w"], ["t"], name="turn", perm=[1, 0]),
        node("MatMul", ["q", "t"], ["m"], name="linear"),
        node("Add", ["m", "b"], ["l"], name="bias"),
        node("Transpose", ["l"], ["k"], name="keys", perm=[1, 0]),
        node("MatMul", ["l", "k"], ["s0"], name="scores"),
        node("Softmax", ["s0"], ["p"], name="softmax"),
        node("MatMul", ["p", "l"], ["o"], name="values"),
        *quantized("o", "y"),
    ]
    model = halved(graph(nodes, [*tensors, constant("b", np.ones(8)), *STEP], rank=2))
    found = types(model)
    assert casts(model) == ["l.fp16", "o.fp32"]
    assert all(found[name] == TensorProto.FLOAT16 for name in ("k", "s0", "p", "o"))
    assert all(found[name] == TensorProto.FLOAT for name in ("t", "m", "l", "y"))


def test_a_product_with_int4_blocks_stays_float32_alone() -> None:
    tensors, dequantize = weight("w", (64, 64), ml_dtypes.int4, axis=1, block_size=64)
    nodes = [
        dequantize,
        node("Transpose", ["w"], ["t"], name="turn", perm=[1, 0]),
        node("Gelu", ["x"], ["g"], name="gelu"),
        node("MatMul", ["g", "t"], ["m"], name="linear"),
        node("Add", ["m", "b"], ["a"], name="bias"),
        node("Relu", ["a"], ["y"], name="relu"),
    ]
    model = halved(graph(nodes, [*tensors, constant("b", np.ones(64))], rank=2, width=64))
    found = types(model)
    assert all(found[name] == TensorProto.FLOAT for name in ("w", "t", "m", "g.fp32"))
    assert found["g"] == found["a"] == TensorProto.FLOAT16
    assert casts(model) == ["g.fp32", "m.fp16", "x.fp16", "y"]


def product(*nodes: Any, tensors: tuple[TensorProto, ...] = (), opset: int = 21, out: int = 2) -> onnx.ModelProto:
    """A float product in front: `h` = x @ W, on which the nodes work."""
    first = node("MatMul", ["x", "W"], ["h"], name="product")
    return graph([first, *nodes], [constant("W", RNG.normal(size=(8, 8))), *tensors], rank=2, opset=opset, out=out)


MASK = [0.0, -3.4028235e38, 0.0, 0.0, -3.4028235e38, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_mask_is_clamped_so_that_no_row_becomes_nan(precision: Any) -> None:
    for values in (MASK, [-3.4028235e38] * 8):
        softmax = [node("Add", ["h", "m"], ["a"], name="mask"), node("Softmax", ["a"], ["y"], name="softmax")]
        model = product(*softmax, tensors=(constant("m", values),))
        mask = next(t for t in halved(model, precision).graph.initializer if t.name == "m")
        assert mask.data_type == HALF[precision]
        array = numpy_helper.to_array(mask).astype(np.float32)
        assert np.isfinite(array).all()
        assert array.min() <= -30000
        if precision == "fp16":
            x = RNG.normal(size=(4, 8)).astype(np.float32)
            expected, found = run(model, x), run(halved(model), x)
            assert np.isfinite(found).all()
            masked = np.array(values) < 0
            if not masked.all():
                assert np.array_equal(found[:, masked], expected[:, masked])


def test_infinite_constants_stay_infinite() -> None:
    softmax = [node("Add", ["h", "m"], ["a"], name="mask"), node("Softmax", ["a"], ["y"], name="softmax")]
    mask = np.where(np.array(MASK) < 0, -np.inf, 0)
    model = halved(product(*softmax, tensors=(constant("m", mask),)))
    stored = next(t for t in model.graph.initializer if t.name == "m")
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.float32), mask)


def test_bounds_beyond_the_range_bound_nothing() -> None:
    clip = node("Clip", ["h", "low", "high"], ["y"], name="clip")
    model = halved(product(clip, tensors=(constant("low", -1e30), constant("high", 3e38))))
    bounds = {t.name: float(numpy_helper.to_array(t)) for t in model.graph.initializer if t.name in ("low", "high")}
    assert bounds == {"low": -65504.0, "high": 65504.0}


@pytest.mark.parametrize(
    ("op", "value"),
    [("Add", 1e-6), ("Mul", 1e6), ("Div", [1.0, 1e-7] * 4), ("Add", [-1e6] * 8), ("Max", 1e-12), ("Pow", 2.0)],
    ids=["epsilon", "overflow", "divisor", "no-mask", "tiny-bound", "sensitive"],
)
def test_what_half_cannot_hold_stays_float32(op: str, value: Any) -> None:
    model = halved(product(node(op, ["h", "k"], ["y"], name="op"), tensors=(constant("k", value),)))
    found = types(model)
    assert found["h"] == TensorProto.FLOAT16
    assert found["k"] == TensorProto.FLOAT
    assert next(list(n.input) for n in model.graph.node if n.name == "op") == ["h.fp32", "k"]
    stored = next(t for t in model.graph.initializer if t.name == "k")
    assert np.array_equal(numpy_helper.to_array(stored), np.asarray(value, np.float32))


def test_a_constant_that_both_types_read_is_there_twice() -> None:
    nodes = [
        node("Add", ["h", "k"], ["a"], name="half"),
        node("Pow", ["a", "k"], ["p"], name="power"),
        node("Mul", ["p", "k"], ["y"], name="float"),
    ]
    found = types(halved(product(*nodes, tensors=(constant("k", 2.0),))))
    assert (found["k"], found["k.fp16"]) == (TensorProto.FLOAT, TensorProto.FLOAT16)
    assert found["W"] == TensorProto.FLOAT16


def test_constants_of_nodes_are_rounded_like_initializers() -> None:
    nodes = [
        node("Constant", [], ["k"], value=constant("k", [2.0])),
        node("Unsqueeze", ["k", "axes"], ["u"], name="unsqueeze"),
        node("Mul", ["h", "u"], ["y"], name="mul"),
    ]
    model = halved(product(*nodes, tensors=(constant("axes", [0], np.int64),)))
    found = types(model)
    assert found["k"] == found["u"] == TensorProto.FLOAT16
    assert casts(model) == ["x.fp16", "y"]


def test_casts_of_the_file_meet_ours_without_a_detour() -> None:
    nodes = [
        node("Greater", ["h", "zero"], ["g"], name="greater"),
        node("Cast", ["g"], ["f"], name="to_float", to=TensorProto.FLOAT),
        node("Mul", ["h", "f"], ["m"], name="mul"),
        node("Cast", ["m"], ["n"], name="to_half", to=TensorProto.FLOAT16),
        node("Cast", ["n"], ["o"], name="back", to=TensorProto.FLOAT),
        node("Relu", ["o"], ["r"], name="relu"),
        node("MatMul", ["r", "W"], ["y"], name="second"),
    ]
    source = product(*nodes, tensors=(constant("zero", 0.0),))
    model = halved(source)
    assert Counter(n.op_type for n in model.graph.node)["Cast"] == 3  # of x, of the condition, of y
    x = RNG.normal(size=(3, 8)).astype(np.float32)
    assert np.abs(run(model, x) - run(source, x)).max() < 0.01 * np.abs(run(source, x)).max()


def test_shapes_and_integers_are_left_alone() -> None:
    nodes = [
        node("Shape", ["h"], ["s0"], name="shape"),
        node("Expand", ["k", "s0"], ["e"], name="expand"),
        node("Add", ["h", "e"], ["a"], name="add"),
        node("TopK", ["a", "three"], ["y", "i"], name="topk"),
    ]
    found = types(halved(product(*nodes, tensors=(constant("k", 1.0), constant("three", [3], np.int64)))))
    assert found["s0"] == found["i"] == found["three"] == TensorProto.INT64
    assert found["e"] == found["a"] == TensorProto.FLOAT16


@pytest.mark.parametrize(("opset", "precision", "kind"), [(21, "bf16", 1), (21, "fp16", 10), (24, "bf16", 16)])
def test_operators_that_do_not_take_the_type_stay_float32(opset: int, precision: Any, kind: int) -> None:
    topk = node("TopK", ["h", "three"], ["t", "i"], name="topk")  # BFLOAT16 since opset 24
    pool = node("AveragePool", ["u"], ["y"], name="pool", kernel_shape=[2], ceil_mode=1)
    lift = node("Unsqueeze", ["t", "axis"], ["u"], name="lift")
    three = (constant("three", [3], np.int64), constant("axis", [0], np.int64))
    found = types(halved(product(topk, lift, pool, tensors=three, opset=opset, out=3), precision))
    assert found["h"] == HALF[precision]
    assert found["t"] == kind


def test_other_domains_and_fixed_types_get_float32() -> None:
    nodes = [
        node("Strange", ["h"], ["o"], name="strange", domain="some.where"),
        node("Add", ["o", "h"], ["y"], name="add"),
    ]
    model = product(*nodes)
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    changed = ir.from_proto(model)
    SetPrecision("fp16")(changed)
    names = {n.name: [v.name for v in n.inputs] for n in changed.graph}
    assert names["strange"] == ["h.fp32"]
    assert names["add"] == ["o", "h.fp32"]


def loop() -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Relu", ["h"], ["inner"])], "body", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    )
    choice = node("If", ["yes"], ["y"], name="choice", then_branch=body, else_branch=body)
    return product(choice, tensors=(constant("yes", True, np.bool_),))


def test_subgraphs_are_refused() -> None:
    with pytest.raises(ir.passes.PreconditionError, match="'choice' has a subgraph"):
        halved(loop())


def test_the_precision_of_a_build(tmp_path: Path) -> None:
    a100, turing = find_target("a100"), find_target("rtx-turing")
    backend = BACKENDS["tensorrt-rtx"]
    files = {}
    for name, model in {
        "plain": weight_only(),
        "loop": loop(),
        "boxes": product(node("RoiAlign", ["h", "h", "i"], ["y"])),
        "typed": product(node("Cast", ["h"], ["y"], to=1), tensors=(constant("k", 1.0, np.float16),)),
    }.items():
        files[name] = tmp_path / f"{name}.onnx"
        onnx.save(model, files[name])
    assert resolve_precision(files["plain"], "auto", a100, backend)[0] == "fp16"
    assert resolve_precision(files["plain"], "bf16", a100, backend) == ("bf16", "asked for")
    for name, why in (("loop", "has If"), ("boxes", "RoiAlign"), ("typed", "holds FLOAT16")):
        precision, reason = resolve_precision(files[name], "auto", a100, backend)
        assert precision == "fp32"
        assert why in reason
    assert resolve_precision(files["loop"], "fp32", a100, backend) == ("fp32", "asked for")
    with pytest.raises(BackendError, match=r"loop\.onnx cannot be built in FP16 .* the graph has If"):
        resolve_precision(files["loop"], "fp16", a100, backend)
    with pytest.raises(BackendError, match="has no BFLOAT16"):
        resolve_precision(files["plain"], "bf16", turing, backend)
