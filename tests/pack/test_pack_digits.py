"""Digits of a small alphabet in bytes: by hand, and there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_reader import plain_digits

from slope_compile.pack.digits import digits_per_byte, join_digits, joined_size, looked_up, split_digits


@pytest.mark.parametrize(
    ("base", "k"), [(2, 8), (3, 5), (4, 4), (5, 3), (6, 3), (7, 2), (11, 2), (15, 2), (16, 2), (17, 1), (256, 1)]
)
def test_as_many_digits_as_fit_share_a_byte(base: int, k: int) -> None:
    assert digits_per_byte(base) == k
    assert base**k <= 256 < base ** (k + 1)


def test_the_first_digit_is_the_lowest_and_the_last_byte_is_filled_with_zeros() -> None:
    assert join_digits(np.array([3, 10, 7], np.uint8), 11).tobytes() == bytes([3 + 11 * 10, 7])
    assert join_digits(np.array([1, 2, 0, 2, 1, 2], np.uint8), 3).tobytes() == bytes([1 + 2 * 3 + 0 + 2 * 27 + 81, 2])
    assert join_digits(np.array([255, 0], np.uint8), 256).tobytes() == b"\xff\0"
    assert join_digits(np.zeros(9, np.uint8), 1).tobytes() == b""


@given(st.integers(1, 256), st.data())
def test_what_is_joined_splits_into_what_it_was(base: int, data: st.DataObject) -> None:
    digits = data.draw(st.lists(st.integers(0, base - 1), max_size=40))
    joined = join_digits(np.array(digits, np.uint8), base)
    assert joined.size == joined_size(len(digits), base)
    assert (
        split_digits(joined, base, len(digits)).tolist() == digits == plain_digits(joined.tobytes(), base, len(digits))
    )


def test_bytes_that_hold_no_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="byte 121 holds no 2 digits of base 11"):
        split_digits(np.array([120, 121], np.uint8), 11, 4)
    with pytest.raises(ValueError, match="not filled up"):
        split_digits(np.array([11], np.uint8), 11, 1)


def test_a_table_is_looked_up_over_block_ends() -> None:
    index = np.random.default_rng(0).integers(0, 256, 2**18 + 5).astype(np.uint8)
    table = np.arange(256)[::-1].astype(np.uint8)
    assert np.array_equal(looked_up(table, index), 255 - index)
