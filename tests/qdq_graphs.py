"""ONNX models of one layer, as other tools write them, for the reader's tests."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES: dict[str, Any] = {
    "INT2": ml_dtypes.int2,
    "UINT2": ml_dtypes.uint2,
    "INT4": ml_dtypes.int4,
    "UINT4": ml_dtypes.uint4,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
}


def tensor(name: str, values: Any, dtype: str) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values).astype(TYPES[dtype]), name)


def shape(name: str, dims: list[int]) -> TensorProto:
    return numpy_helper.from_array(np.array(dims, dtype=np.int64), name)


def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=f"{op}:{output}", **attributes)


def model(
    nodes: list[onnx.NodeProto],
    tensors: list[TensorProto],
    rank: int = 2,
    opset: int = 25,
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    """A model from `x` to `y`, both float of the given rank and any size."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}{i}" for i in range(rank)]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("local", 1)] if functions else [])
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=13)


def coded(
    codes: Any,
    scale: Any,
    dtype: str = "INT4",
    op: str = "Conv",
    zero_point: Any = None,
    scale_dtype: str = "FLOAT",
    axis: int = 0,
    block_size: int = 0,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model that multiplies its input with `w`, stored as `w.codes` and `w.scale`."""
    tensors = [tensor("w.codes", codes, dtype), tensor("w.scale", scale, scale_dtype)]
    inputs = ["w.codes", "w.scale"]
    if zero_point is not None:
        tensors.append(tensor("w.zero", zero_point, dtype))
        inputs.append("w.zero")
    blocks = {"block_size": block_size} if block_size else {}
    dequantize = node("DequantizeLinear", inputs, "w", axis=axis, **blocks)
    return model([dequantize, node(op, ["x", "w"], "y", **attributes)], tensors, rank=np.asarray(codes).ndim)


def sparse_codes(rng: np.random.Generator, dims: tuple[int, ...], bits: int, axis: int) -> np.ndarray:
    """Random b-bit codes with at most 2 nonzeros in every 4 along an axis, at random places."""
    codes = np.moveaxis(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), dims), axis, -1)
    groups = codes.reshape(*codes.shape[:-1], -1, 4)
    keep = np.argsort(rng.random(groups.shape), axis=-1) < 2
    return np.ascontiguousarray(np.moveaxis((groups * keep).reshape(codes.shape), -1, axis)).astype(np.int8)
