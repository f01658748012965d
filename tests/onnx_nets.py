"""Small coded ONNX files, written by hand: what an export of ours would hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def tensor(name: str, array: Any, dtype: str) -> TensorProto:
    if dtype == "INT2":
        return helper.make_tensor(name, TensorProto.INT2, array.shape, array.ravel().tolist())
    kind = {"INT4": ml_dtypes.int4, "INT8": np.int8, "FLOAT": np.float32}[dtype]
    return numpy_helper.from_array(array.astype(kind), name)


def coded(name: str, codes: Any, scale: Any, dtype: str, **attributes: int) -> tuple[list[TensorProto], Any]:
    """The naming law: NAME.codes and NAME.scale through NAME.dq make NAME."""
    tensors = [tensor(f"{name}.codes", codes, dtype), tensor(f"{name}.scale", scale, "FLOAT")]
    inputs = [f"{name}.codes", f"{name}.scale"]
    return tensors, helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dq", **attributes)


def save(
    path: Path, nodes: list[Any], tensors: list[TensorProto], shape: list[Any], output: str, opset: int = 21
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        tensors,
    )
    imports = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=13 if opset >= 25 else 10), path)
    return path


def sparse_codes(shape: tuple[int, ...], low: int, high: int) -> Any:
    """Codes of which the last two in every four along axis 1 are zero."""
    codes = np.random.default_rng(0).integers(low, high + 1, shape)
    codes[:, 2::4] = 0
    codes[:, 3::4] = 0
    return codes
