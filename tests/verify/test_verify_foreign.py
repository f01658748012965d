"""The laws on files of other tools: what can be read is judged, the rest is said; none ends in a traceback."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from slope_compile.qdq.reader import iter_weights
from slope_compile.verify.laws.check import check_pattern
from slope_compile.verify.laws.files import Artifacts
from slope_compile.verify.verdict import Check, attempt

RNG = np.random.default_rng(0)
SIGNED = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
UNSIGNED = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8}
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}
HOLD = "scales and zero points of 2 coded weights obey the laws"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What other tools say is not for these tests."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


class Images(CalibrationDataReader):
    def __init__(self) -> None:
        self.images = iter([{"x": RNG.normal(size=(2, 8, 6, 6)).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> Any:
        return next(self.images, None)


def floats(folder: Path, opset: int) -> Path:
    """conv, relu, pool, matmul, bias."""
    arrays = {"w1": (8, 8, 3, 3), "b1": (8,), "w2": (8, 32), "b2": (32,)}
    tensors = [numpy_helper.from_array(RNG.normal(size=s).astype(np.float32), n) for n, s in arrays.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], "conv"), helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"), helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "w2"], ["m"], "product"), helper.make_node("Add", ["m", "b2"], ["y"], "add"),
    ]  # fmt: skip
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8, 6, 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=imports)
    model.ir_version = {13: 7}.get(opset, 10 if opset < 25 else 13)
    onnx.save(model, folder / "float.onnx")
    return folder / "float.onnx"


def pattern(path: Path) -> Check:
    return attempt("pattern", lambda: check_pattern(lambda: iter_weights(path), None, None, Artifacts(path)))


@pytest.mark.parametrize("opset", [13, 17, 21, 25])
def test_floats(tmp_path: Path, opset: int) -> None:
    check = pattern(floats(tmp_path, opset))
    assert (check.status, check.figures["tensors"]) == ("not checked", 2)
    assert check.detail == "nothing declares bits and pattern: no coded tensors were given"


@pytest.mark.parametrize(
    ("opset", "options", "status", "said"),
    [
        (13, {"per_channel": True, **SIGNED, "extra_options": SYMMETRIC}, "not checked", HOLD),
        (21, {**SIGNED, "weight_type": QuantType.QInt4, "extra_options": SYMMETRIC}, "not checked", HOLD),
        (13, {**SIGNED}, "fail", "x_zero_point: zero point: of the activation"),
        (13, UNSIGNED, "fail", "w1_quantized: zero point"),
        (21, {"weight_type": QuantType.QUInt4}, "fail", "w1_quantized: zero point: 1 of 1 are not 0"),
        (21, {"activation_type": QuantType.QUInt16}, "not checked", "element type UINT16, which is not read here"),
        (13, {"quant_format": QuantFormat.QOperator}, "fail", "x_zero_point"),
        (13, {"quant_format": QuantFormat.QOperator, **SIGNED, "extra_options": SYMMETRIC}, "not checked",
         "the weights of 1 QLinearConv: such operators are not read"),
        (13, {**SIGNED, "extra_options": {"UseQDQContribOps": True}}, "not checked",
         "com.microsoft.DequantizeLinear: such operators are not read"),
    ],
)  # fmt: skip
def test_quantized_statically(tmp_path: Path, opset: int, options: dict[str, Any], status: str, said: str) -> None:
    path = tmp_path / "q.onnx"
    quantize_static(str(floats(tmp_path, opset)), str(path), Images(), **options)
    check = pattern(path)
    assert check.status == status, check.detail
    assert said in f"{check.detail} {check.figures}"


def test_quantized_dynamically(tmp_path: Path) -> None:
    quantize_dynamic(str(floats(tmp_path, 13)), str(tmp_path / "q.onnx"))
    check = pattern(tmp_path / "q.onnx")
    assert check.status == "not checked"
    assert "the weights of 1 MatMulInteger" in str(check.figures["not_examined"])
    assert "computed as the graph runs" in str(check.figures["not_examined"])


@pytest.mark.parametrize(
    ("kind", "symmetric", "status", "said"),
    [
        (QuantFormat.QOperator, True, "not checked", "the weights of 1 com.microsoft.MatMulNBits"),
        (QuantFormat.QDQ, True, "fail", "are not positive and finite"),  # its scales have the largest weight's sign
        (QuantFormat.QDQ, False, "fail", "zero point"),
    ],
)
def test_matmul_nbits(tmp_path: Path, kind: QuantFormat, symmetric: bool, status: str, said: str) -> None:
    model = onnx.load(floats(tmp_path, 21))
    quantizer = MatMulNBitsQuantizer(model, block_size=16, is_symmetric=symmetric, quant_format=kind)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
    check = pattern(tmp_path / "q.onnx")
    assert check.status == status and said in check.detail


def test_a_type_that_is_not_read_is_no_failure(tmp_path: Path) -> None:
    codes = numpy_helper.from_array(RNG.normal(size=(4, 4)).astype(ml_dtypes.float8_e4m3fn), "w.codes")
    tensors = [codes, numpy_helper.from_array(np.float32(0.5), "s")]
    nodes = [
        helper.make_node("DequantizeLinear", ["w.codes", "s"], ["w"], "dq"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "product"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors)), path)
    check = pattern(path)
    assert (check.status, "FLOAT8E4M3FN" in check.detail) == ("not checked", True)
