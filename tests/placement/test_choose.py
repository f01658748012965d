from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slope_compile.placement.choose import place, place_all
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.backends import BACKENDS

TENSORRT, RTX = BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]


def weight(
    stored: Any = None, dtype: str = "INT4", op: str = "Conv", block_size: int = 0, axis: int = 1, **more: Any
) -> CodedWeight:
    stored = np.ones((8, 128), np.int8) if stored is None else stored
    values: dict[str, Any] = {
        "name": "w", "stored": stored, "dtype": dtype, "scale": np.float32(1), "zero_point": None, "axis": None,
        "block_size": block_size, "value_dtype": "FLOAT", "op": op, "node": "n", "steps": (), "consumed_axis": axis,
    }  # fmt: skip
    return CodedWeight(**(values | more))


@pytest.mark.parametrize(
    ("op", "dtype", "block", "rtx", "tensorrt"),
    [
        ("Conv", "INT4", 0, ("INT4", "int4-storage"), ("INT8", "int8-weight")),
        ("ConvTranspose", "INT4", 0, ("INT4", "int4-storage"), ("INT8", "int8-weight")),
        ("Conv", "INT2", 0, ("INT4", "int4-storage"), ("INT8", "int8-weight")),
        ("Conv", "INT8", 0, ("INT8", "int8-weight"), ("INT8", "int8-weight")),
        ("Gemm", "INT4", 128, ("INT4", "int4-weight"), ("INT4", "int4-weight")),
        ("MatMul", "INT4", 64, ("INT4", "int4-weight"), ("INT4", "int4-weight")),
        ("MatMul", "INT4", 0, ("INT4", "int4-weight"), ("INT8", "int8-weight")),
        ("Gemm", "INT4", 32, ("INT4", "int4-weight"), ("INT8", "int8-weight")),
        ("Gemm", "INT2", 128, ("INT4", "int4-weight"), ("INT4", "int4-weight")),
        ("Gemm", "INT8", 0, ("INT8", "int8-weight"), ("INT8", "int8-weight")),
        ("Conv", "FLOAT", 0, ("FLOAT", "float"), ("FLOAT", "float")),
        ("Gemm", "FLOAT16", 0, ("FLOAT16", "float"), ("FLOAT16", "float")),
    ],
)
def test_table(op: str, dtype: str, block: int, rtx: tuple[str, str], tensorrt: tuple[str, str]) -> None:
    one = weight(dtype=dtype, op=op, block_size=block)
    for backend, expected in ((RTX, rtx), (TENSORRT, tensorrt)):
        found = place(one, backend)
        assert (found.container, found.placement) == expected
        assert found.reason


def test_reasons_name_the_cause() -> None:
    assert "TensorRT has no INT4 convolution" in place(weight(), TENSORRT).reason
    assert "blocks of 64 or 128" in place(weight(op="Gemm"), TENSORRT).reason
    assert "cannot import INT2" in place(weight(dtype="INT2"), RTX).reason


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_an_odd_number_of_elements_takes_8_bits(op: str) -> None:
    """Seen: "Sub-byte quantization with odd tensor volume is not supported" fails the whole build."""
    found = place(weight(np.ones((3, 3, 3, 3), np.int8), op=op), RTX)
    assert (found.container, found.placement) == ("INT8", "int8-weight")
    assert "even number" in found.reason


def test_a_shared_weight_takes_the_wider_container() -> None:
    shared = [weight(op="Gemm", block_size=128), weight(op="Conv"), weight(name="v", op="Gemm", block_size=128)]
    assert [p.container for p in place_all(shared, TENSORRT)] == ["INT8", "INT8", "INT4"]


def test_is_sparse_counts_along_the_reduction_axis() -> None:
    codes = np.ones((4, 8, 1, 1), np.int8)
    codes[:, [0, 1, 6, 7]] = 0
    assert is_sparse(weight(codes))
    codes[2, 0] = 1  # a third nonzero in one group
    assert not is_sparse(weight(codes))
    matmul = np.zeros((8, 3), np.int8)
    matmul[[0, 3, 4, 5]] = 1
    assert is_sparse(weight(matmul, op="MatMul", axis=0))
    assert not is_sparse(weight(np.ascontiguousarray(matmul.T), op="MatMul", axis=0))


def test_what_is_not_sparse() -> None:
    assert not is_sparse(weight(np.ones((4, 6, 1, 1), np.int8)))  # 6 channels make no groups of 4
    assert not is_sparse(weight(np.zeros((4, 8, 1, 1), np.int8)))
    half = np.tile(np.array([1, 1, 0, 0], np.int8), (4, 2))
    assert is_sparse(weight(half))
    assert not is_sparse(weight(half, zero_point=np.ones(4, np.int8)))  # a stored 0 is not a 0 then


@pytest.mark.parametrize("backend", [TENSORRT, RTX])
@pytest.mark.parametrize(("op", "dtype", "block"), [("Conv", "INT4", 0), ("Gemm", "INT4", 128), ("MatMul", "INT8", 0)])
def test_beside_a_quantized_activation_codes_ride_in_int8(backend: Any, op: str, dtype: str, block: int) -> None:
    sparse = np.ones((8, 128), np.int8)
    sparse[:, ::2] = 0
    found = place(weight(sparse, dtype=dtype, op=op, block_size=block), backend, reads_int8=True)
    assert (found.container, found.placement) == ("INT8", "sparse-int8")
    assert place(weight(dtype=dtype, op=op, block_size=block), backend, reads_int8=True).placement == "int8"
    assert place(weight(dtype="FLOAT", op=op), backend, reads_int8=True).placement == "float"


def test_the_operators_node_decides() -> None:
    first, second = weight(name="a", node="n1"), weight(name="b", node="n2")
    assert [p.placement for p in place_all([first, second], RTX, {"n2"})] == ["int4-storage", "int8"]
