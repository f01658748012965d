"""For every lint rule a graph that breaks it, and its twin that does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from lint_graphs import (
    IMAGE,
    activation,
    conv,
    dense,
    int4,
    matmul,
    model,
    nearly_sparse,
    pair,
    pairs,
    pool,
    run_time_weight,
    skip,
    sparse,
    tensor,
    weight,
)  # fmt: skip
from onnx import TensorProto, helper
from qdq_graphs import node

Make = Callable[[], onnx.ModelProto]


def bias(dtype: str) -> onnx.ModelProto:
    stored, dequantize = weight(dense(8, 8, 1, 1), np.full(8, 0.5), axis=0)
    nodes = [*pair("x", "a"), dequantize, node("DequantizeLinear", ["i", "w.scale"], "b", axis=0)]
    tensors = [*stored.values(), *activation().values(), tensor("i", np.ones(8), dtype)]
    return model([*nodes, node("Conv", ["a", "w", "b"], "c"), *pair("c", "y")], tensors)


def run_time_scale(computed: bool) -> onnx.ModelProto:
    top = node("ReduceMax", ["x"], "s", keepdims=0)
    given = [tensor("z", 0, "INT8")] + ([] if computed else [tensor("s", 0.5)])
    return model([*([top] if computed else []), *pair("x", "a"), node("Relu", ["a"], "y")], given)


def of_types(scale: str, floats: str, opset: int = 23) -> onnx.ModelProto:
    nodes = [node("Cast", ["x"], "h", to=getattr(TensorProto, floats)), *pair("h", "y")]
    return model(nodes, activation(scale_dtype=scale), opset=opset)


def factors(cast: bool) -> onnx.ModelProto:
    nodes = [*([node("Cast", ["x"], "a", to=TensorProto.FLOAT16)] if cast else [node("Identity", ["x"], "a")])]
    return model(
        [*nodes, node("MatMul", ["a", "h"], "y")], [tensor("h", np.ones((8, 8)), "FLOAT16")], made=TensorProto.FLOAT16
    )


def float_weight(stored: str, quantized: bool = True) -> onnx.ModelProto:
    """A Conv that reads INT8, with a weight as codes, as floats with a quantizer, or as floats."""
    tensors, dequantize = weight(dense(8, 8, 1, 1), 0.5)
    nodes = [*(pair("x", "a") if quantized else [node("Identity", ["x"], "a")])]
    if stored == "floats":
        tensors = {"w": tensor("w", dense(8, 8, 1, 1))}
    elif stored == "quantized floats":
        tensors = {"w": tensor("v", dense(8, 8, 1, 1))}
        nodes += pair("v", "w")
    else:
        nodes.append(dequantize)
    return model([*nodes, node("Conv", ["a", "w"], "c"), *pair("c", "y")], [*tensors.values(), *activation().values()])


def attention(second: bool) -> onnx.ModelProto:
    nodes = [*pair("x", "a"), *pair("v", "b"), node("MatMul", ["a", "b" if second else "v"], "y")]
    return pairs(*nodes, shape=[2, 8, 8], inputs={"v": [2, 8, 8]})


def concat(scale: str, both: bool = True) -> onnx.ModelProto:
    nodes = [*pair("x", "a"), *pair("v", "b", scale), node("Concat", ["a", "b" if both else "v"], "y", axis=1)]
    return pairs(*nodes, inputs={"v": IMAGE})


def nested_concat(scale: str) -> onnx.ModelProto:
    inner = [*pair("x", "a"), *pair("v", "b", scale), node("Concat", ["a", "b"], "c", axis=1), *pair("w", "d")]
    return pairs(*inner, node("Concat", ["c", "d"], "y", axis=1), inputs={"v": IMAGE, "w": IMAGE})


def class_token(constant: bool) -> onnx.ModelProto:
    """A token, or an input, that is repeated for every image and put before what is quantized."""
    dims = node("Concat", ["batch", "rest"], "dims", axis=0)
    nodes = [*pair("x", "a"), node("Shape", ["x"], "batch", start=0, end=1), dims]
    nodes += [node("Expand", ["token" if constant else "v", "dims"], "e"), node("Concat", ["e", "a"], "y", axis=1)]
    tensors = [tensor("token", np.ones((1, 1, 8))), tensor("rest", [1, 8], "INT64")]
    return pairs(*nodes, shape=["n", 4, 8], inputs={} if constant else {"v": [1, 1, 8]}, tensors=tensors)


def epilogue(*ops: str, read: bool = False) -> onnx.ModelProto:
    """A 2:4 Conv beside INT8, some operators behind it, Q/DQ behind them; or something else reads floats, too."""
    stored, dequantize = weight(sparse(8, 8, 1, 1), np.full(8, 0.5), axis=0)
    nodes, value = [*pair("x", "a"), dequantize, node("Conv", ["a", "w"], "c")], "c"
    for number, op in enumerate(ops):
        more = ["c"] if op == "Mul" else []
        nodes.append(node(op, [value, *more], f"v{number}"))
        value = f"v{number}"
    nodes += [*pair(value, "y" if not read else "q")]
    if read:
        nodes += [node("Softmax", [value], "m"), node("Sub", ["q", "m"], "y")]
    return model(nodes, [*stored.values(), *activation().values()])


def codes_cast() -> onnx.ModelProto:
    """An INT4 Conv whose codes a Cast reads, too."""
    graph = conv(dtype="INT4", quantized=False)
    graph.graph.node[-1].output[0] = "o"
    graph.graph.node.append(node("Cast", ["w.codes"], "k", to=TensorProto.FLOAT))
    graph.graph.node.append(node("ReduceSum", ["k"], "t"))
    graph.graph.node.append(node("Add", ["o", "t"], "y"))
    return graph


def behind_conv(op: str, order: str) -> onnx.ModelProto:
    stored, dequantize = weight(dense(8, 8, 1, 1), np.full(8, 0.5), axis=0)
    statistics = [tensor(f"n{i}", np.ones(8)) for i in range(4)]
    extra = [t.name for t in statistics] if op == "BatchNormalization" else []
    late = [node(op, ["c", *extra], "r"), *pair("r", "y")]
    early = [*pair("c", "d"), node(op, ["d", *extra], "e"), *pair("e", "y")]
    nodes = [*pair("x", "a"), dequantize, node("Conv", ["a", "w"], "c"), *(early if order == "early" else late)]
    return model(nodes, [*stored.values(), *activation().values(), *(statistics if extra else [])])


def foreign(domain: str, op: str = "DequantizeLinear") -> onnx.ModelProto:
    dequantize = helper.make_node(op, ["q", "s", "z"], ["y"], name="dq", domain=domain)
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "q"), dequantize]
    return model(nodes, activation(), domains=(domain,) if domain else ())


def external(location: str) -> onnx.ModelProto:
    graph = matmul()
    codes = next(t for t in graph.graph.initializer if t.name == "w.codes")
    raw = codes.raw_data
    if location:
        codes.ClearField("raw_data")
        codes.data_location = TensorProto.EXTERNAL
        codes.external_data.add(key="location", value=location)
    assert len(raw) == 256 * 64
    return graph


def short(cut: int, dtype: str = "INT8") -> onnx.ModelProto:
    graph = conv(tensors=(tensor("unused", np.ones(4), dtype),))
    graph.graph.initializer[-1].raw_data = graph.graph.initializer[-1].raw_data[cut:]
    return graph


def renamed(*names: str) -> onnx.ModelProto:
    graph = conv()
    for each, name in zip(graph.graph.node, names, strict=False):
        each.name = name
    return graph


def attribute(value: object) -> onnx.ModelProto:
    graph = conv(scale=0.5, axis=0)
    dequantize = next(n for n in graph.graph.node if n.output[0] == "w")
    dequantize.attribute[0].CopyFrom(helper.make_attribute("axis", value))
    return graph


def odd(dtype: str, used: bool) -> onnx.ModelProto:
    """An odd table that no layer multiplies with, or a weight."""
    if used:
        return conv(dense(5, 1, 3, 3), np.full(5, 0.5), dtype, quantized=False, group=1)
    nodes = [node("DequantizeLinear", ["k", "s"], "t"), node("Gather", ["t", "i"], "g"), node("Add", ["x", "g"], "y")]
    return model(nodes, [tensor("k", np.ones((3, 3)), dtype), tensor("s", 0.5), tensor("i", 0, "INT64")], [2, 3])


def clipped(highest: float) -> onnx.ModelProto:
    nodes = [node("Clip", ["x", "low", "high"], "c"), *pair("c", "a"), node("Relu", ["a"], "y")]
    return model(nodes, [*activation(dtype="UINT8").values(), tensor("low", 0), tensor("high", highest)])


def rank_of_block() -> onnx.ModelProto:
    codes = dense(16, 128, 3, 3)
    return conv(
        codes, np.linspace(0.1, 1, 16 * 2 * 9).reshape(16, 2, 3, 3), "INT4", quantized=False, axis=1, block_size=64
    )


BROKEN: list[tuple[str, str, str, Make, Make]] = [
    # rule, level, part of the detail, a graph that breaks it, a twin that does not
    ("scale-positive", "error", "1 of 16 scales are not, the first at [3]: 0.0",
     lambda: conv(scale=np.where(np.arange(16) == 3, 0, 0.5)), conv),
    ("scale-positive", "error", "[]: nan", lambda: conv(act=activation(np.nan)), conv),
    ("scale-positive", "error", "inf", lambda: conv(scale=np.full(16, np.inf)), conv),
    ("scale-positive", "error", "-0.5", lambda: conv(scale=np.full(16, -0.5)), conv),
    ("scale-positive", "error", "0.0", lambda: matmul(scale=np.zeros(64), scale_dtype="FLOAT16", axis=1), matmul),
    ("scale-shape", "error", "(16,) would fit", lambda: conv(scale=np.full(7, 0.5)), conv),
    ("scale-shape", "error", "(2, 64) would fit",
     lambda: matmul(dense(256, 64), np.full((3, 64), 0.5), "INT4", axis=0, block_size=128),
     lambda: int4((256, 64), 128)),
    ("scale-shape", "error", "there is no axis 9", lambda: conv(axis=9), conv),
    ("scale-shape", "error", "zero points of shape (8,)",
     lambda: conv(zero=np.zeros(8)), lambda: conv(zero=np.zeros(16))),
    ("computed-scale", "error", "'s' is computed", lambda: run_time_scale(True), lambda: run_time_scale(False)),
    ("zero-point", "error", "zero point 3", lambda: conv(act=activation(zero=3)), conv),
    ("zero-point", "error", "zero point 0 to 1",
     lambda: conv(zero=np.arange(16) > 3), lambda: conv(zero=np.zeros(16))),
    ("scale-type", "warning", "scale FLOAT, floats FLOAT16",
     lambda: of_types("FLOAT", "FLOAT16"), lambda: of_types("FLOAT", "FLOAT")),
    ("scale-type", "warning", "scale FLOAT, floats FLOAT16",
     lambda: matmul(opset=23, output_dtype=TensorProto.FLOAT16), lambda: matmul(opset=23)),
    ("per-channel-activation", "error", "8 scales",
     lambda: conv(act=activation(np.full(8, 0.1), np.zeros(8)), act_attributes={"axis": 1}), conv),
    ("weight-axis", "warning", "along axis 1", lambda: conv(scale=np.full(8, 0.5), axis=1), conv),
    ("weight-axis", "warning", "along axis 0",
     lambda: matmul(scale=np.full(256, 0.5), axis=0, quantized=True), lambda: matmul(axis=1, quantized=True)),
    ("int4-block-size", "warning", "blocks of 32", lambda: int4((256, 64), 32), lambda: int4((256, 64), 64)),
    ("int4-block-size", "warning", "no blocks", lambda: matmul(dtype="INT4", axis=1), lambda: int4((256, 64), 128)),
    ("block-axis", "warning", "along axis 1", rank_of_block, lambda: int4((256, 64), 128)),
    ("block-tail", "warning", "200 elements in blocks of 128", lambda: int4((200, 64), 128),
     lambda: int4((256, 64), 128)),
    ("block-type", "warning", "INT8 in blocks of 128",
     lambda: matmul(scale=np.full((2, 64), 0.5), axis=0, block_size=128), lambda: int4((256, 64), 128)),
    ("uint8", "error", "quantizes to UINT8", lambda: conv(act=activation(dtype="UINT8")), conv),
    ("uint8", "error", "quantizes to UINT8", lambda: clipped(12.8), lambda: clipped(12.7)),
    ("uint8", "error", "quantizes to UINT8",
     lambda: pairs(*pair("x", "a", zero=""), node("Relu", ["a"], "y")),
     lambda: pairs(*pair("x", "a"), node("Relu", ["a"], "y"))),
    ("uint8", "error", "the UINT8 tensor 'x'",
     lambda: pairs(node("DequantizeLinear", ["x", "s"], "y"), dtype=TensorProto.UINT8),
     lambda: pairs(node("DequantizeLinear", ["x", "s"], "y"), dtype=TensorProto.INT8)),
    ("uint8", "warning", "the UINT8 tensor 'w.codes'",
     lambda: conv(dtype="UINT8", quantized=False), lambda: conv(quantized=False)),
    ("narrow-type", "warning", "INT2 [16, 8, 3, 3]",
     lambda: conv(np.ones((16, 8, 3, 3)), dtype="INT2", quantized=False, opset=25),
     lambda: conv(quantized=False, opset=25)),
    ("narrow-type", "warning", "UINT4", lambda: matmul(dtype="UINT4", axis=1), matmul),
    ("narrow-type", "error", "UINT4",
     lambda: matmul(dtype="UINT4", axis=1, zero=np.full(64, 8)), lambda: matmul(axis=1, zero=np.zeros(64))),
    ("narrow-type", "error", "UINT16", lambda: conv(act=activation(dtype="UINT16")), conv),
    ("target-type", "error", "has no FLOAT8E4M3FN", lambda: conv(act=activation(dtype="FLOAT8E4M3FN")), conv),
    ("odd-count", "warning", "45 elements", lambda: odd("INT4", True), lambda: odd("INT8", True)),
    ("odd-count", "error", "9 elements", lambda: odd("INT4", False), lambda: odd("INT8", False)),
    ("int32-dequantize", "error", "INT32 tensor 'i'", lambda: bias("INT32"), lambda: bias("INT8")),
    ("int4-conv", "warning", "'w' is INT4", lambda: conv(dtype="INT4", quantized=False), lambda: conv(quantized=False)),
    ("int4-conv", "error", "'w' is INT4", codes_cast, lambda: conv(quantized=False)),
    ("int4-int8-input", "warning", "its activation is quantized", lambda: conv(dtype="INT4"), conv),
    ("int4-int8-input", "warning", "'w' is INT4", lambda: int4((256, 64), 128, quantized=True),
     lambda: int4((256, 64), 128)),
    ("mixed-factors", "error", "multiplies FLOAT with FLOAT16", lambda: factors(False), lambda: factors(True)),
    ("opset-too-old", "error", "need opset 13; the file has 11", lambda: conv(opset=11), lambda: conv(opset=13)),
    ("opset-too-old", "error", "nodes need opset 10", lambda: conv(opset=9, scale=0.5),
     lambda: conv(opset=10, scale=0.5)),
    ("opset-too-old", "error", "need opset 19",
     lambda: matmul(scale_dtype="FLOAT16", axis=1, opset=18), lambda: matmul(scale_dtype="FLOAT16", axis=1, opset=19)),
    ("opset-too-old", "error", "INT4 tensors need opset 21",
     lambda: int4((256, 64), 128, opset=20), lambda: int4((256, 64), 128, opset=21)),
    ("opset-too-new", "warning", "opset 29", lambda: conv(opset=29), lambda: conv(opset=28)),
    ("half-quantized", "warning", "its weight is stored as FLOAT", lambda: float_weight("floats"),
     lambda: float_weight("codes")),
    ("half-quantized", "warning", "its activation is not",
     lambda: float_weight("codes", quantized=False), lambda: float_weight("floats", quantized=False)),
    ("half-quantized", "warning", "one of its two activations", lambda: attention(False), lambda: attention(True)),
    ("residual-add", "warning", "neither side", lambda: skip(False), lambda: skip(True)),
    ("residual-add", "warning", "one side is quantized",
     lambda: pairs(*pair("x", "a"), node("Add", ["a", "v"], "d"), *pair("d", "y"), inputs={"v": IMAGE}),
     lambda: pairs(*pair("x", "a"), *pair("v", "b"), node("Add", ["a", "b"], "d"), *pair("d", "y"),
                   inputs={"v": IMAGE})),
    ("concat-scales", "warning", "0.1, 0.25", lambda: concat("t"), lambda: concat("s")),
    ("concat-scales", "warning", "1 of 2 inputs", lambda: concat("s", both=False), lambda: concat("s")),
    ("concat-scales", "warning", "0.1, 0.25", lambda: nested_concat("t"), lambda: nested_concat("s")),
    ("concat-scales", "warning", "1 of 2 inputs", lambda: class_token(False), lambda: class_token(True)),
    ("average-pool", "warning", "its output is not", lambda: pool(True, False), lambda: pool(True, True)),
    ("average-pool", "warning", "its input is not", lambda: pool(False, True), lambda: pool(False, False)),
    ("inside-fusion", "warning", "and the Relu", lambda: behind_conv("Relu", "early"),
     lambda: behind_conv("Relu", "late")),
    ("inside-fusion", "warning", "and the BatchNormalization",
     lambda: behind_conv("BatchNormalization", "early"), lambda: behind_conv("BatchNormalization", "late")),
    ("double-quantized", "warning", "has just dequantized",
     lambda: pairs(*pair("x", "a"), *pair("a", "b"), node("Relu", ["b"], "y")),
     lambda: pairs(*pair("x", "a"), node("MaxPool", ["a"], "p", kernel_shape=[2, 2]), *pair("p", "b"),
                   node("Relu", ["b"], "y"))),
    ("double-quantized", "warning", "has just dequantized",
     lambda: pairs(*pair("x", "a"), node("Flatten", ["a"], "f"), *pair("f", "b", "t"), node("Relu", ["b"], "y")),
     lambda: pairs(*pair("x", "a"), node("Flatten", ["a"], "f"), *pair("f", "b"), node("Relu", ["b"], "y"))),
    ("unpaired-quantize", "warning", "read by Cast",
     lambda: pairs(node("QuantizeLinear", ["x", "s", "z"], "q"), node("Cast", ["q"], "y", to=1)),
     lambda: pairs(*pair("x", "y"))),
    ("unpaired-quantize", "warning", "nothing dequantizes",
     lambda: pairs(node("QuantizeLinear", ["x", "s", "z"], "y")),
     lambda: pairs(node("QuantizeLinear", ["x", "s", "z"], "q"), node("MaxPool", ["q"], "p", kernel_shape=[2, 2]),
                   node("DequantizeLinear", ["p", "s", "z"], "y"))),
    ("computed-weight", "warning", "'v' is computed as", lambda: run_time_weight(False), lambda: run_time_weight(True)),
    ("quantized-at-run-time", "warning", "'v' is stored as floats",
     lambda: float_weight("quantized floats"), lambda: float_weight("codes")),
    ("malformed-weight", "error", "is dequantized twice",
     lambda: model([node("DequantizeLinear", ["k", "s"], "a"), node("DequantizeLinear", ["a", "s"], "b"),
                    node("Conv", ["x", "b"], "y")],
                   [tensor("k", dense(8, 8, 1, 1), "INT8"), tensor("s", 0.5)]), conv),
    ("malformed-weight", "error", "no weight of a Gemm",
     lambda: model([node("Gemm", ["x", "k"], "y")], [tensor("k", np.ones(8))], [2, 8]),
     lambda: model([node("Gemm", ["x", "k"], "y")], [tensor("k", np.ones((8, 8)))], [2, 8])),
    ("pattern-broken", "warning", "1 of 576 groups break 2:4, the first from [5, 0, 1, 1] on",
     lambda: conv(nearly_sparse()), lambda: conv(sparse(64, 4, 3, 3))),
    ("pattern-axis", "warning", "2:4 along axis 0", lambda: conv(sparse(16, 8, 3, 3, axis=0)),
     lambda: conv(sparse(16, 8, 3, 3))),
    ("pattern-axis", "warning", "flattened filters",
     lambda: conv(sparse(16, 8 * 4).reshape(16, 8, 2, 2)), lambda: conv(dense(16, 8, 2, 2))),
    ("pattern-channels", "warning", "6 input channels",
     lambda: conv(np.tile([[0], [1]], (16, 3)).reshape(16, 6, 1, 1)), lambda: conv(dense(16, 6, 1, 1))),
    ("grouped-sparse", "warning", "in 2 groups", lambda: conv(sparse(16, 4, 3, 3), group=2),
     lambda: conv(sparse(16, 4, 3, 3))),
    ("sparse-float-output", "warning", "stays in floats",
     lambda: conv(sparse(16, 8, 3, 3), ending="float"), lambda: conv(sparse(16, 8, 3, 3))),
    ("sparse-float-output", "warning", "stays in floats",
     lambda: epilogue("Sigmoid", "Mul", read=True), lambda: epilogue("Sigmoid", "Mul")),
    ("sparse-float-output", "warning", "stays in floats", lambda: epilogue("Softmax"), lambda: epilogue("Gelu")),
    ("order", "error", "reads 'zzz'", lambda: model([node("Add", ["x", "zzz"], "y")]),
     lambda: model([node("Add", ["x", "x"], "y")])),
    ("order", "error", "reads 'b', which nothing makes before it",
     lambda: model([node("Relu", ["b"], "a"), node("Relu", ["a"], "b"), node("Add", ["x", "b"], "y")]),
     lambda: model([node("Relu", ["x"], "a"), node("Relu", ["a"], "b"), node("Add", ["x", "b"], "y")])),
    ("order", "error", "reads 'y'",
     lambda: model([node("Relu", ["x"], "z")]), lambda: model([node("Relu", ["x"], "y")])),
    ("operator", "error", "does not build QLinearMatMul, 2 times",
     lambda: model([node("QLinearMatMul", [*"xszkszsz"], "a"), node("QLinearMatMul", [*"aszkszsz"], "y")],
                   [*activation().values(), tensor("k", np.ones((8, 8)), "INT8")], dtype=TensorProto.INT8), conv),
    ("custom-domain", "error", "com.microsoft::DequantizeLinear", lambda: foreign("com.microsoft"),
     lambda: foreign("")),
    ("trt-domain", "warning", "trt::DequantizeLinear", lambda: foreign("trt"), lambda: foreign("ai.onnx")),
    ("input-shape", "error", "has no shape",
     lambda: model([node("Relu", ["x"], "y")], shape=None), lambda: model([node("Relu", ["x"], "y")])),
    ("dynamic-axis", "error", "axis 2 ('h') is dynamic",
     lambda: model([node("Relu", ["x"], "y")], shape=["n", 3, "h", 8]),
     lambda: model([node("Relu", ["x"], "y")], shape=["n", 3, 8, 8])),
    ("dynamic-axis", "error", "axis 1 has the length 0",
     lambda: model([node("Relu", ["x"], "y")], shape=[2, 0]), lambda: model([node("Relu", ["x"], "y")], shape=[2, 1])),
    ("node-names", "warning", "2 of 7 nodes have no name", lambda: renamed("", ""), conv),
    ("node-names", "warning", "1 names belong to several", lambda: renamed("one", "one"),
     lambda: renamed("one", "two")),
    ("attribute-type", "error", "'axis' is no INT", lambda: attribute(0.0), lambda: attribute(0)),
    ("external-data", "error", "outside the model's folder", lambda: external("../other.bin"), lambda: external("")),
    ("external-data", "error", "outside the model's folder", lambda: external("/etc/hostname"), lambda: external("")),
    ("external-data", "error", "is missing", lambda: external("gone.bin"), lambda: external("")),
    ("tensor-data", "error", "needs 4 bytes, holds 3", lambda: short(1), lambda: short(0)),
    ("tensor-data", "error", "needs 8 bytes, holds 7", lambda: short(1, "UINT16"), lambda: short(0)),
]  # fmt: skip
