"""Causes that are told from two tensors alone, where no constant tells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from slope_compile.verify.bisect.arrays import array_cause
from slope_compile.verify.bisect.distance import CHUNK, relative_error, share_beyond, statistics
from slope_compile.verify.bisect.tensors import tensor_cause

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 6, 6, 6)).astype(np.float32)


def bias(x: Any) -> Any:
    return x + RNG.standard_normal((1, 6, 1, 1)).astype(np.float32)


def nan(x: Any) -> Any:
    x[1, 2, 3, 4] = np.nan
    return x


def one(x: Any) -> Any:
    x[1, 2, 3, 4] += 5
    return x


def grid(x: Any) -> Any:
    return np.clip(np.rint(x / 0.05), -8, 7) * np.float32(0.05)


def noise(size: float) -> Callable[[Any], Any]:
    return lambda x: x + size * np.abs(x).max() * RNG.uniform(-1, 1, x.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x: x * 4, "scale off by a power of two: x 4"),
        (lambda x: x * 1.3, "scale off by 1.3"),
        (lambda x: -x, "sign flipped"),
        (lambda x: -2 * x, "sign flipped and scale off by a power of two: x 2"),
        (lambda x: np.maximum(x, 0), "unsigned clipped"),
        (lambda x: np.clip(x, -1, 1), "clipped to -1 ... 1"),
        (bias, "bias missing or another one: the difference is one number a channel (axis 1)"),
        (lambda x: x.swapaxes(2, 3), "transposed: axes 2 and 3"),
        (lambda x: x[:, :, :3], "of shape [2, 6, 3, 6], expected [2, 6, 6, 6]"),
        (lambda x: x.reshape(6, 2, 6, 6), "transposed: of shape"),
        (lambda x: x[:, [0, 2, 1, 3, 4, 5]], "channels permuted: 2 of 6 along axis 1"),
        (grid, "extra output quantizer: this lies on a grid of step 0.05"),
        (lambda x: x.astype(np.float16).astype(np.float32), "rounded to lower precision: all values are FP16"),
        (lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), "rounded to lower precision: all values are BF16"),
        (noise(2.0**-11), "products in FP16, TF32 or BF16"),
        (noise(0.02), "products of 8-bit integers"),
        (nan, "NaN or infinity: 1 of 432 values"),
        (one, "unknown: 1 of 432 values differ, the first at [1, 2, 3, 4]"),
    ],
)
def test_what_happened_to_a_tensor_is_told(change: Callable[[Any], Any], cause: str) -> None:
    assert cause in tensor_cause(X, change(X.copy()))


def test_what_a_reference_has_and_the_other_lacks_is_told_too() -> None:
    assert tensor_cause(grid(X), X).startswith("missing output quantizer: the reference lies on a grid of step 0.05")
    assert tensor_cause(np.maximum(X, 0), X).startswith("missing Relu")


def test_equal_arrays_have_no_cause_and_nan_equals_itself() -> None:
    array = nan(X.copy())
    assert array_cause(array, array.copy()) is None
    assert array_cause(np.ones(3, np.float32), np.zeros(3, np.float32)) == "all 0"
    assert array_cause(np.zeros(3, np.float32), np.ones(3, np.float32)) is not None


def test_errors_are_relative_to_the_largest_value_and_infinite_where_nothing_can_be_compared() -> None:
    zeros = np.zeros(4, np.float32)
    assert relative_error(np.float32([1, -4]), np.float32([1, -3])) == 0.25
    assert relative_error(zeros, zeros) == 0
    assert relative_error(zeros, zeros + 2) == 2
    assert relative_error(zeros[:0], zeros[:0]) == 0
    assert relative_error(zeros, zeros[:2]) == np.inf
    assert relative_error(zeros, np.float32([0, 0, 0, np.nan])) == np.inf
    assert relative_error(np.float32([np.nan, 2]), np.float32([np.nan, 1])) == 0.5
    far = np.zeros(CHUNK + 2, np.float32)
    far[0], moved = 8, far.copy()
    moved[-1] = 2  # the largest value and the largest error lie in different parts
    moved[0] = 8
    assert relative_error(far, moved) == 2 / 8
    assert share_beyond(np.float32([1, 1, 1, 1]), np.float32([1, 1, 1, 2]), 0.5) == 0.25
    assert share_beyond(zeros, zeros[:2], 0.5) == 1


def test_statistics_leave_out_what_is_not_finite() -> None:
    told = statistics(np.float32([[0, 1], [np.inf, 3]]))
    assert told["shape"] == [2, 2] and told["not_finite"] == 1 and told["zeros"] == 1
    assert (told["min"], told["max"]) == (0, 3)
    assert statistics(np.float32([np.nan])) == {"shape": [1], "zeros": 0, "not_finite": 1}
