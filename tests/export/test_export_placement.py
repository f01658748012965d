from __future__ import annotations

import numpy as np
import pytest

from slope_compile.compression.codes import CodedTensor
from slope_compile.export.placement import place


@pytest.mark.parametrize(
    ("shape", "bits", "op", "opset", "expected"),
    [
        ((16, 8, 3, 3), 4, "Conv", 21, ("int4-storage", "INT4", 0)),
        ((16, 8, 3, 3), 2, "Conv", 24, ("int4-storage", "INT4", 0)),
        ((16, 8, 3, 3), 2, "Conv", 25, ("int4-storage", "INT2", 0)),
        ((16, 8, 3, 3), 3, "Conv", 25, ("int4-storage", "INT4", 0)),
        ((16, 8, 3, 3), 5, "Conv", 21, ("int8-weight", "INT8", 0)),
        ((16, 8, 3, 3), 8, "Conv", 25, ("int8-weight", "INT8", 0)),
        ((3, 5, 3, 3), 4, "Conv", 21, ("int8-weight", "INT8", 0)),
        ((3, 5, 3, 3), 2, "Conv", 25, ("int8-weight", "INT8", 0)),
        ((10, 256), 4, "Gemm", 21, ("int4-weight", "INT4", 128)),
        ((10, 192), 4, "MatMul", 21, ("int4-weight", "INT4", 64)),
        ((10, 192), 2, "MatMul", 25, ("int4-weight", "INT2", 64)),
        ((10, 100), 4, "MatMul", 21, ("int4-storage", "INT4", 0)),
        ((3, 5), 3, "Gemm", 21, ("int8-weight", "INT8", 0)),
        ((10, 128), 6, "Gemm", 21, ("int8-weight", "INT8", 0)),
    ],
)
def test_the_table(shape: tuple, bits: int, op: str, opset: int, expected: tuple) -> None:
    tensor = CodedTensor(np.zeros(shape, np.int8), np.ones(shape[0], np.float32), bits, 0, None)
    placement = place(tensor, op, opset)
    assert (placement.name, placement.container, placement.block_size) == expected
    assert placement.reason


def test_reasons_name_the_numbers() -> None:
    odd = CodedTensor(np.zeros((3, 5, 3, 3), np.int8), np.ones(3, np.float32), 4, 0, None)
    assert "135 elements" in place(odd, "Conv", 21).reason
    uneven = CodedTensor(np.zeros((10, 100), np.int8), np.ones(10, np.float32), 4, 0, None)
    assert "100 input channels" in place(uneven, "MatMul", 21).reason


def test_beside_a_quantized_activation_codes_ride_in_int8() -> None:
    codes = np.ones((8, 8, 3, 3), np.int8)
    dense = CodedTensor(codes, np.ones(8, np.float32), 4, 0, None)
    assert place(dense, "Conv", 21, reads_int8=True).name == "int8"
    codes = codes.copy()
    codes[:, ::2] = 0
    sparse = place(CodedTensor(codes, np.ones(8, np.float32), 2, 0, (2, 4)), "MatMul", 25, reads_int8=True)
    assert (sparse.name, sparse.container, sparse.block_size) == ("sparse-int8", "INT8", 0)
    assert "2-bit codes ride unchanged" in sparse.reason
