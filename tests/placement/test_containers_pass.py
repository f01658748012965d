from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from qdq_graphs import coded, node

from slope_compile.placement.passes.containers import WidenCodes
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(5)


def run(source: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def widen(source: onnx.ModelProto, **containers: str) -> onnx.ModelProto:
    graph = ir.from_proto(source)
    WidenCodes(containers)(graph)
    widened = ir.to_proto(graph)
    onnx.checker.check_model(widened, full_check=True)
    return widened


@pytest.mark.parametrize(("narrow", "wide"), [("INT2", "INT4"), ("INT2", "INT8"), ("INT4", "INT8")])
@pytest.mark.parametrize(
    ("op", "dims", "attributes"),
    [
        ("Conv", (6, 4, 3, 3), {}),
        ("Conv", (5, 3, 3, 3), {}),
        ("MatMul", (6, 5), {"axis": 1}),
        ("Gemm", (6, 64), {"transB": 1, "axis": 1, "block_size": 32}),
        ("Conv", (6, 4, 1, 1), {"zero_point": np.zeros(6)}),
    ],
)
def test_the_output_stays_bit_for_bit(narrow: str, wide: str, op: str, dims: tuple, attributes: dict) -> None:
    bits = int(narrow[3])
    codes = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), dims)
    scale: Any = RNG.uniform(0.1, 1, dims[attributes.get("axis", 0)]).astype(np.float32)
    if "block_size" in attributes:
        scale = np.repeat(RNG.uniform(0.1, 1, (dims[0], 1)).astype(np.float32), 2, axis=1)
    source = coded(codes, scale, narrow, op, **attributes)
    x = RNG.standard_normal((2, dims[0] if op == "MatMul" else dims[1], 8, 8)[: len(dims)]).astype(np.float32)
    widened = widen(source, w=wide)
    (weight,) = coded_weights(widened)
    assert weight.dtype == wide
    assert np.array_equal(weight.codes, codes)
    assert np.array_equal(run(source, x), run(widened, x))
    # TensorRT takes block scales with INT4 only.
    assert weight.block_size == (32 if "block_size" in attributes and wide == "INT4" else 0)


def test_blocks_with_their_own_scales_stay() -> None:
    scale = np.arange(1, 9, dtype=np.float32).reshape(4, 2)
    source = coded(RNG.integers(-8, 8, (4, 64)), scale, op="Gemm", transB=1, axis=1, block_size=32)
    (weight,) = coded_weights(widen(source, w="INT8"))
    assert (weight.block_size, weight.scale.tolist()) == (32, scale.tolist())


def test_blocks_along_the_first_axis() -> None:
    scale = np.repeat(np.arange(1, 5, dtype=np.float32)[None], 2, axis=0)
    source = coded(RNG.integers(-8, 8, (64, 4)), scale, op="MatMul", axis=0, block_size=32)
    (weight,) = coded_weights(widen(source, w="INT8"))
    assert (weight.axis, weight.scale.tolist()) == (1, [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("containers", "message"),
    [
        ({"v": "INT8"}, "no initializer 'v.codes'"),
        ({"w": "INT2"}, "INT4 codes of 'w' cannot be widened to INT2"),
        ({"w": "INT4"}, "INT4 codes of 'w' cannot be widened to INT4"),
        ({"w": "FLOAT"}, "cannot be widened to FLOAT"),
    ],
)
def test_what_cannot_be_widened_is_refused(containers: dict[str, str], message: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=message):
        widen(coded(np.ones((4, 4)), 1.0, op="MatMul"), **containers)


def test_codes_that_something_else_uses_are_refused() -> None:
    source = coded(np.ones((4, 4)), 1.0, op="MatMul")
    source.graph.node.append(node("Cast", ["w.codes"], "z", to=1))
    with pytest.raises(ir.passes.PreconditionError, match="'w' are used by Cast"):
        widen(source, w="INT8")
