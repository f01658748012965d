from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verify_twins import make_codes, make_twin

from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.parity.tolerance import EPS32, reduction_length, tolerance_of


@pytest.mark.parametrize("turned", [False, True])
def test_reductions_are_counted_for_convolutions_and_products(turned: bool, tmp_path: Path) -> None:
    weights = coded_weights(replace(make_twin(), turned_fc=turned).write(tmp_path / "m.onnx"))
    assert {weight.name: reduction_length(weight) for weight in weights} == {
        "conv1.weight": 8 * 3 * 3, "conv2.weight": 8, "fc.weight": 32,
    }  # fmt: skip
    expected = 2.0**-23 * (math.sqrt(72) + math.sqrt(8) + math.sqrt(32))
    assert tolerance_of(weights).relative == pytest.approx(expected)
    assert tolerance_of(weights, ten_bits=True).relative == pytest.approx(expected + 3 * 2.0**-10)


def test_float16_weights_allow_ten_bits(tmp_path: Path) -> None:
    half = replace(make_twin(), half_scales=True, codes=make_codes(power_of_two_scales=True))
    assert tolerance_of(coded_weights(half.write(tmp_path / "m.onnx"))).relative > 3 * 2.0**-10


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 3000), st.integers(0, 2**32 - 1))
def test_two_orders_of_one_sum_stay_within_the_bound(length: int, seed: int) -> None:
    """Products added one by one, forwards and backwards: the worst that implementations do."""
    rng = np.random.default_rng(seed)
    products = (rng.standard_normal((64, length)) * rng.integers(-8, 8, (64, length))).astype(np.float32)
    forwards = np.cumsum(products, axis=1, dtype=np.float32)[:, -1]
    backwards = np.cumsum(products[:, ::-1], axis=1, dtype=np.float32)[:, -1]
    assert np.abs(forwards - backwards).max() <= EPS32 * math.sqrt(length) * np.abs(forwards).max()
