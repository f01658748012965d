from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from placement_models import run_proto
from qdq_graphs import coded, node

from slope_compile.placement.passes.containers import SetContainers
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(5)


def store(source: onnx.ModelProto, **containers: str) -> onnx.ModelProto:
    graph = ir.from_proto(source)
    SetContainers(containers)(graph)
    stored = ir.to_proto(graph)
    onnx.checker.check_model(stored, full_check=True)
    return stored


@pytest.mark.parametrize(
    ("before", "after"), [("INT2", "INT4"), ("INT2", "INT8"), ("INT4", "INT8"), ("INT8", "INT4"), ("UINT4", "INT8")]
)
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
def test_the_output_stays_bit_for_bit(before: str, after: str, op: str, dims: tuple[int, ...], attributes: Any) -> None:
    bits = 2 if before == "INT2" else 4
    codes = RNG.integers(0 if before == "UINT4" else -(2 ** (bits - 1)), 2 ** (bits - 1), dims)
    scale: Any = RNG.uniform(0.1, 1, dims[attributes.get("axis", 0)]).astype(np.float32)
    if "block_size" in attributes:
        scale = np.repeat(RNG.uniform(0.1, 1, (dims[0], 1)).astype(np.float32), 2, axis=1)
    source = coded(codes, scale, before, op, **attributes)
    x = RNG.standard_normal((2, dims[0] if op == "MatMul" else dims[1], 8, 8)[: len(dims)]).astype(np.float32)
    stored = store(source, w=after)
    (weight,) = coded_weights(stored)
    assert weight.dtype == after
    assert np.array_equal(weight.codes, codes)
    assert np.array_equal(run_proto(source, x), run_proto(stored, x))


@pytest.mark.parametrize(
    ("dtype", "containers", "message"),
    [
        ("INT4", {"v": "INT8"}, "no initializer 'v.codes'"),
        ("INT8", {"w": "INT4"}, r"codes of 'w' span \[-9, 8\], which INT4 cannot hold"),
        ("UINT8", {"w": "INT8"}, r"span \[0, 200\], which INT8 cannot hold"),
        ("INT4", {"w": "INT2"}, "INT4 codes of 'w' cannot be stored as INT2"),
        ("INT4", {"w": "FLOAT"}, "cannot be stored as FLOAT"),
        ("FLOAT", {"w": "INT8"}, "FLOAT codes of 'w' cannot be stored as INT8"),
    ],
)
def test_what_cannot_be_stored_so_is_refused(dtype: str, containers: dict[str, str], message: str) -> None:
    codes = {"INT4": [[-8, 7]], "INT8": [[-9, 8]], "UINT8": [[0, 200]], "FLOAT": [[1, 2]]}[dtype]
    source = coded(np.array(codes), 1.0, "INT8" if dtype == "FLOAT" else dtype, op="MatMul")
    if dtype == "FLOAT":
        source.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 2), np.float32), "w.codes"))
    with pytest.raises(ir.passes.PreconditionError, match=message):
        store(source, **containers)


def test_codes_that_something_else_uses_are_refused() -> None:
    source = coded(np.ones((4, 4)), 1.0, op="MatMul")
    source.graph.node.append(node("Cast", ["w.codes"], "z", to=1))
    with pytest.raises(ir.passes.PreconditionError, match="'w' are used by Cast"):
        store(source, w="INT8")
