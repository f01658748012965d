"""ONNX files of a layer or two that break one lint rule each, and the twin that does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from qdq_graphs import TYPES, node, sparse_codes

from slope_compile.placement.situation import Situation
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.target import find_target

RNG = np.random.default_rng(0)
KINDS = TYPES | {
    "INT16": np.int16, "UINT16": np.uint16, "INT32": np.int32, "INT64": np.int64,
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
}  # fmt: skip
IMAGE = [2, 8, 8, 8]


def situation(backend: str = "tensorrt", target: str = "a100", version: str = "11.4.1") -> Situation:
    return Situation(find_target(target), BACKENDS[backend], version, "fp16", 16)


def tensor(name: str, values: Any, dtype: str = "FLOAT") -> TensorProto:
    return numpy_helper.from_array(np.asarray(values).astype(KINDS[dtype]), name)


def model(
    nodes: list[NodeProto],
    tensors: Mapping[str, TensorProto] | list[TensorProto] = (),
    shape: list[Any] | None = IMAGE,
    opset: int = 21,
    inputs: Mapping[str, list[Any]] | None = None,
    dtype: int = TensorProto.FLOAT,
    domains: tuple[str, ...] = (),
    made: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A graph from `x` (and other inputs) to `y`."""
    given = [helper.make_tensor_value_info("x", dtype, shape)]
    given += [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in (inputs or {}).items()]
    initializers = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
    result = helper.make_tensor_value_info("y", made, None)
    graph = helper.make_graph(nodes, "g", given, [result], initializers)
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=13)


def pair(x: str, y: str, scale: str = "s", zero: str = "z", **attributes: Any) -> list[NodeProto]:
    """QuantizeLinear and DequantizeLinear of one value."""
    inputs = [scale, zero] if zero else [scale]
    return [
        node("QuantizeLinear", [x, *inputs], f"{y}_q", **attributes),
        node("DequantizeLinear", [f"{y}_q", *inputs], y, **attributes),
    ]


def activation(
    scale: Any = 0.1, zero: Any = 0, dtype: str = "INT8", scale_dtype: str = "FLOAT"
) -> dict[str, TensorProto]:
    return {"s": tensor("s", scale, scale_dtype), "z": tensor("z", zero, dtype)}


def weight(
    codes: Any, scale: Any, dtype: str = "INT8", zero: Any = None, scale_dtype: str = "FLOAT", **attributes: Any
) -> tuple[dict[str, TensorProto], NodeProto]:
    """`w`, stored as codes and scales, and its DequantizeLinear."""
    tensors = {"c": tensor("w.codes", codes, dtype), "d": tensor("w.scale", scale, scale_dtype)}
    inputs = ["w.codes", "w.scale"]
    if zero is not None:
        tensors["e"] = tensor("w.zero", zero, dtype)
        inputs.append("w.zero")
    return tensors, node("DequantizeLinear", inputs, "w", **attributes)


def dense(*shape: int) -> Any:
    return RNG.integers(1, 8, shape)


def conv(
    codes: Any = None,
    scale: Any = None,
    dtype: str = "INT8",
    quantized: bool = True,
    act: dict[str, TensorProto] | None = None,
    opset: int = 21,
    group: int = 1,
    ending: str = "quantized",
    axis: int = 0,
    tensors: tuple[TensorProto, ...] = (),
    act_attributes: Mapping[str, Any] | None = None,
    **of_weight: Any,
) -> onnx.ModelProto:
    """x -> (Q, DQ) -> Conv -> Relu -> (Q, DQ): what TensorRT likes best; each argument spoils one thing."""
    codes = dense(16, 8, 3, 3) if codes is None else codes
    scale = np.full(len(codes), 0.5) if scale is None else scale
    stored, dequantize = weight(codes, scale, dtype, axis=axis, **of_weight)
    nodes = [*(pair("x", "a", **(act_attributes or {})) if quantized else [node("Identity", ["x"], "a")]), dequantize]
    nodes.append(node("Conv", ["a", "w"], "c", group=group))
    nodes += [node("Relu", ["c"], "r")]
    nodes += pair("r", "y", "t", "u") if quantized and ending == "quantized" else [node("Identity", ["r"], "y")]
    after = {"t": tensor("t", 0.25), "u": tensor("u", 0, "INT8")} if quantized else {}
    before = (activation() if act is None else act) if quantized else {}
    shape = [2, codes.shape[1] * group, *IMAGE[2:]]
    return model(nodes, [*stored.values(), *before.values(), *after.values(), *tensors], shape, opset=opset)


def matmul(
    codes: Any = None,
    scale: Any = None,
    dtype: str = "INT8",
    quantized: bool = False,
    opset: int = 21,
    **of_weight: Any,
) -> onnx.ModelProto:
    """x -> (Q, DQ) -> MatMul."""
    codes = dense(256, 64) if codes is None else codes
    stored, dequantize = weight(codes, np.full(np.shape(codes)[1], 0.5) if scale is None else scale, dtype, **of_weight)
    nodes = [*(pair("x", "a") if quantized else [node("Identity", ["x"], "a")]), dequantize]
    tensors = [*stored.values(), *(activation().values() if quantized else ())]
    nodes.append(node("MatMul", ["a", "w"], "m" if quantized else "y"))
    if quantized:
        nodes += pair("m", "y")
    return model(nodes, tensors, [2, len(codes)], opset=opset)


def int4(shape: tuple[int, int], block: int, axis: int = 0, **options: Any) -> onnx.ModelProto:
    """A MatMul with INT4 blocks."""
    blocks = [-(-n // block) if a == axis else n for a, n in enumerate(shape)]
    return matmul(dense(*shape), np.full(blocks, 0.5), "INT4", axis=axis, block_size=block, **options)


def pairs(*nodes: NodeProto, shape: list[Any] | None = IMAGE, **options: Any) -> onnx.ModelProto:
    """Nodes between quantizers with scales `s` (0.1) and `t` (0.25)."""
    tensors = [*activation().values(), tensor("t", 0.25)]
    return model(list(nodes), tensors + options.pop("tensors", []), shape, **options)


def sparse(*shape: int, axis: int = 1) -> Any:
    return sparse_codes(np.random.default_rng(1), shape, 4, axis)


def nearly_sparse() -> Any:
    """2:4 but for one of 576 groups."""
    codes = sparse(64, 4, 3, 3)
    codes[5, :, 1, 1] = 1
    return codes


def run_time_weight(folded: bool) -> onnx.ModelProto:
    """A Conv whose weight is an input, or an initializer."""
    nodes = [node("Conv", ["x", "v"], "y")]
    shape = [16, 8, 3, 3]
    return model(nodes, [tensor("v", np.ones(shape))]) if folded else model(nodes, inputs={"v": shape})


def skip(quantized: bool) -> onnx.ModelProto:
    """A residual block with an INT8 conv: y = Q(Relu(Conv(DQ(x)) + skip))."""
    stored, dequantize = weight(dense(8, 8, 1, 1), np.full(8, 0.5), axis=0)
    nodes = [
        *pair("x", "a"), dequantize, node("Conv", ["a", "w"], "c"), node("Sigmoid", ["x"], "side"),
        *pair("side", "b"), node("Add", ["c", "b" if quantized else "side"], "d"), node("Relu", ["d"], "r"),
        *pair("r", "y"),
    ]  # fmt: skip
    return model(nodes, [*stored.values(), *activation().values()])


def pool(before: bool, after: bool) -> onnx.ModelProto:
    """A pool behind and before quantizers."""
    nodes = [*pair("x", "a"), node("GlobalAveragePool", ["a" if before else "x"], "p"), *pair("p", "y")]
    if not after:
        nodes[-2:] = [node("Softmax", ["p"], "y")]
    return pairs(*nodes)
