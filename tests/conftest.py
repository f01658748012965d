from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

Write = Callable[..., Path]


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


@pytest.fixture(scope="session")
def net(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Writes conv (INT4 or INT2, per channel, 2:4) -> relu -> mean -> Gemm (INT4, blocks of 128) -> float Gemm."""

    def write(conv: str = "INT4", gemm: str = "INT4", shape: tuple[Any, ...] = ("batch", 4, 6, 6)) -> Path:
        rng = np.random.default_rng(1)
        low, high = (-2, 1) if conv == "INT2" else (-7, 7)
        c, c_dq = coded("c.weight", sparse_codes((128, 4, 3, 3), low, high), np.full(128, 0.5), conv, axis=0)
        f, f_dq = coded("f.weight", rng.integers(-7, 8, (8, 128)), np.full((8, 1), 0.25), gemm, axis=1, block_size=128)
        h = tensor("h.weight", rng.normal(size=(3, 8)), "FLOAT")
        nodes = [
            c_dq,
            f_dq,
            helper.make_node("Conv", ["x", "c.weight"], ["c"], name="c", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"], name="r"),
            helper.make_node("GlobalAveragePool", ["r"], ["p"], name="p"),
            helper.make_node("Flatten", ["p"], ["v"], name="v"),
            helper.make_node("Gemm", ["v", "f.weight"], ["f"], name="f", transB=1),
            helper.make_node("Gemm", ["f", "h.weight"], ["h"], name="h", transB=1),
        ]
        path = tmp_path_factory.mktemp("net") / "model.onnx"
        return save(path, nodes, [*c, *f, h], list(shape), "h", 25 if conv == "INT2" else 21)

    return write
