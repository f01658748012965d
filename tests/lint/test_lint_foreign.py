"""Files that other tools wrote: onnxruntime.quantization and torch.onnx."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lint_graphs import model, situation, tensor
from lint_models import deit, resnet, small
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from qdq_graphs import node

from slope_compile.lint.check import lint

RNG = np.random.default_rng(0)
SIGNED = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What other tools warn of is not for these tests."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


class Images(CalibrationDataReader):
    def __init__(self) -> None:
        self.images = iter([{"x": RNG.normal(size=(2, 16, 8, 8)).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> Any:
        return next(self.images, None)


def floats(folder: Path, opset: int) -> Path:
    """conv, relu, conv, residual add, relu, pool, matmul, bias."""
    tensors = [tensor("w1", RNG.normal(size=(16, 16, 3, 3))), tensor("b1", RNG.normal(size=16))]
    tensors += [tensor("w2", RNG.normal(size=(16, 16, 3, 3))), tensor("b2", RNG.normal(size=16))]
    tensors += [tensor("w3", RNG.normal(size=(16, 64))), tensor("b3", RNG.normal(size=64))]
    nodes = [
        node("Conv", ["x", "w1", "b1"], "c", pads=[1] * 4), node("Relu", ["c"], "r"),
        node("Conv", ["r", "w2", "b2"], "d", pads=[1] * 4), node("Add", ["d", "r"], "a"), node("Relu", ["a"], "e"),
        node("GlobalAveragePool", ["e"], "p"), node("Flatten", ["p"], "f"), node("MatMul", ["f", "w3"], "m"),
        node("Add", ["m", "b3"], "y"),
    ]  # fmt: skip
    graph = model(nodes, tensors, ["n", 16, 8, 8], opset=opset)
    graph.ir_version = {11: 6, 13: 7}.get(opset, 10)
    onnx.save(graph, folder / "float.onnx")
    return folder / "float.onnx"


def levels(path: Path) -> dict[str, str]:
    return {v.rule: v.level for v in lint(path, situation())}


@pytest.mark.parametrize(
    ("opset", "options", "expected"),
    [
        (13, {"activation_type": QuantType.QUInt8}, {"uint8", "zero-point", "int32-dequantize"}),
        (11, {"per_channel": True, **SIGNED}, {"opset-too-old", "zero-point", "int32-dequantize"}),
        (13, {"per_channel": True, **SIGNED, "extra_options": SYMMETRIC}, {"int32-dequantize"}),
        (13, {"per_channel": True, **SIGNED, "extra_options": {**SYMMETRIC, "QuantizeBias": False}}, set()),
        (13, {"quant_format": QuantFormat.QOperator}, {"operator", "custom-domain", "zero-point"}),
        (21, {"activation_type": QuantType.QUInt16}, {"narrow-type", "int32-dequantize"}),
        (13, {**SIGNED, "extra_options": {"UseQDQContribOps": True}}, {"custom-domain"}),
    ],
    ids=["uint8", "opset11", "bias", "symmetric", "qoperator", "uint16", "contrib"],
)  # fmt: skip
def test_quantized_statically(tmp_path: Path, opset: int, options: dict[str, Any], expected: set[str]) -> None:
    path = tmp_path / "q.onnx"
    source = floats(tmp_path, opset)
    assert levels(source) == {}
    quantize_static(str(source), str(path), Images(), **options)
    assert {rule for rule, level in levels(path).items() if level == "error"} == expected


def test_quantized_dynamically(tmp_path: Path) -> None:
    quantize_dynamic(str(floats(tmp_path, 13)), str(tmp_path / "q.onnx"))
    assert levels(tmp_path / "q.onnx")["operator"] == "error"


@pytest.mark.parametrize(
    ("kind", "symmetric", "rules"),
    [
        (QuantFormat.QOperator, True, {"custom-domain"}),
        # Its scales have the sign of the largest weight.
        (QuantFormat.QDQ, True, {"scale-positive", "int4-block-size"}),
        (QuantFormat.QDQ, False, {"narrow-type", "zero-point"}),
    ],
)
def test_matmul_nbits(tmp_path: Path, kind: QuantFormat, symmetric: bool, rules: set[str]) -> None:
    quantizer = MatMulNBitsQuantizer(
        onnx.load(floats(tmp_path, 21)), block_size=16, is_symmetric=symmetric, quant_format=kind
    )
    quantizer.process()
    path = tmp_path / "q.onnx"
    quantizer.model.save_model_to_file(str(path))
    assert set(levels(path)) == rules


@pytest.mark.parametrize(("make", "dynamo"), [(resnet, False), (deit, False), (small, True)])
def test_float_exports_of_torch(tmp_path: Path, make: Any, dynamo: bool) -> None:
    path = tmp_path / "m.onnx"
    torch.onnx.export(make(), (torch.randn(1, 3, 32, 32),), path, dynamo=dynamo, verbose=False)
    assert levels(path) == {}
