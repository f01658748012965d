"""Codes as byte symbols: which layout is taken, its bytes by hand, and a second decoder in plain loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_files import sparse
from pack_reader import plain_codes

from slope_compile.pack.groups import mask_count, masks_of, most_taken, ranks_of, taken_of, words_of
from slope_compile.pack.header import Codes, Groups
from slope_compile.pack.layouts import decode_codes, encode_codes, run_sizes
from slope_compile.pack.streams import unpacked


def there_and_back(codes: Any, zero: int = 0, sizes: tuple[int, ...] = (4, 8, 16)) -> Codes:
    spec, stored = encode_codes(codes, zero, sizes)
    runs = [unpacked(run.data, run.raw) for run in stored]
    assert [run.raw for run in stored] == run_sizes(spec, codes.shape) == [run.size for run in runs]
    assert spec.streams == tuple((len(run.data), run.raw) for run in stored)
    found = decode_codes(spec, codes.shape, codes.dtype, runs)
    assert found.dtype == codes.dtype and np.array_equal(found, codes)
    assert plain_codes(spec.model_dump(), list(codes.shape), [run.tobytes() for run in runs]) == codes.ravel().tolist()
    return spec


@st.composite
def small_codes(draw: st.DrawFn) -> Any:
    bits, unsigned = draw(st.integers(2, 8)), draw(st.booleans())
    shape = draw(
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 12, 16]), max_size=4).filter(lambda s: math.prod(s) < 3000)
    )
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    low, high = sorted((draw(st.integers(low, high)), draw(st.integers(low, high))))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    codes = rng.integers(low, high + 1, shape).astype(np.uint8 if unsigned else np.int8)
    if codes.ndim and codes.size and draw(st.booleans()):
        zero = draw(st.sampled_from([0, low, high, (low + high) // 2]))
        codes[rng.random(shape) < draw(st.sampled_from([0.5, 0.9, 1.0]))] = zero
    return codes


@settings(max_examples=100, deadline=None)
@given(small_codes(), st.integers(-128, 255), st.sampled_from([(4, 8, 16), (3, 5), (6, 32), (1, 2), ()]))
def test_any_codes_come_back_and_a_second_decoder_reads_them(codes: Any, zero: int, sizes: tuple[int, ...]) -> None:
    within = (
        zero if (0 if codes.dtype == np.uint8 else -128) <= zero <= (255 if codes.dtype == np.uint8 else 127) else 0
    )
    there_and_back(codes, within, sizes)


@pytest.mark.parametrize(
    ("n", "m", "axis", "shape"),
    [
        (2, 4, 1, (64, 64, 3, 3)), (1, 4, 1, (64, 64)), (2, 8, 1, (64, 64)), (4, 8, 1, (64, 64, 1)),
        (2, 4, 0, (128, 40)), (1, 16, 1, (64, 64)), (2, 16, 2, (4, 24, 64)),
    ],
)  # fmt: skip
def test_a_pattern_is_found_along_its_axis(n: int, m: int, axis: int, shape: tuple[int, ...]) -> None:
    codes = sparse(shape, n, m, axis)
    spec = there_and_back(codes)
    assert spec.groups is not None
    assert (spec.groups.axis, spec.groups.zero) == (axis, 0)
    assert spec.groups.n / spec.groups.m <= n / m
    assert spec.groups.nonzeros == np.count_nonzero(codes)


def test_a_declared_pattern_of_odd_size_is_tried() -> None:
    spec = there_and_back(sparse((64, 60), 2, 6, 1), sizes=(4, 8, 16, 6))
    assert spec.groups is not None and (spec.groups.n, spec.groups.m) == (2, 6)
    assert there_and_back(sparse((64, 96), 1, 32, 1), sizes=(32,)).groups == Groups(
        axis=1, n=1, m=32, zero=0, nonzeros=int(np.count_nonzero(sparse((64, 96), 1, 32, 1)))
    )


def test_codes_without_pattern_are_kept_as_they_are_smallest() -> None:
    rng = np.random.default_rng(0)
    dense = rng.integers(-8, 8, (64, 64)).astype(np.int8)
    assert there_and_back(dense).groups is None
    scattered = np.where(rng.random((63, 61)) < 0.9, 0, rng.integers(-128, 128, (63, 61))).astype(np.int8)
    spec = there_and_back(scattered)  # 63 x 61: no whole groups along any axis
    assert spec.groups is not None and spec.groups.axis is None


def test_sparse_around_a_zero_point() -> None:
    codes = (sparse((32, 64), 2, 4, 1).astype(np.int16) + 8).astype(np.uint8)
    spec = there_and_back(codes, zero=8)
    assert spec.groups is not None and spec.groups.zero == 8


def test_constant_empty_and_scalar_codes_take_no_bytes() -> None:
    for codes in (
        np.full((5, 8), -3, np.int8),
        np.zeros((0, 4), np.int8),
        np.zeros((), np.int8),
        np.zeros(7, np.uint8),
    ):
        assert there_and_back(codes).streams == ((0, 0),)


def test_the_bytes_of_two_groups_by_hand() -> None:
    """2:4 of [5, 0, 0, -1] and [0, 2, 0, 0]: masks 9 and 2, ranks 7 and 2 of 0 1 2 3 4 5 6 8 9 10 12."""
    assert masks_of(2, 4).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 12]
    taken = np.array([True, False, False, True, False, True, False, False])
    words = words_of(taken, 4)
    assert words.tolist() == [9, 2] and ranks_of(words, masks_of(2, 4)).tolist() == [8, 2]
    spec = Codes(low=-1, high=5, groups=Groups(axis=1, n=2, m=4, zero=0, nonzeros=3), streams=((1, 1), (2, 2)))
    # digits of base 6 without zero: -1 -> 0, 1 -> 1, 2 -> 2, 5 -> 5; three a byte: 5 + 6 * 0 + 36 * 2
    assert run_sizes(spec, (1, 8)) == [1, 1]
    runs = [np.array([8 + 11 * 2], np.uint8), np.array([5 + 36 * 2], np.uint8)]
    assert decode_codes(spec, (1, 8), np.int8, runs).tolist() == [[5, 0, 0, -1, 0, 2, 0, 0]]


@pytest.mark.parametrize("m", [1, 2, 3, 4, 6, 8, 12, 16, 32, 48, 64])
def test_masks_of_every_group_size(m: int) -> None:
    rng = np.random.default_rng(m)
    taken = np.zeros((50, m), np.bool_)
    taken[np.arange(50), rng.integers(0, m, 50)] = rng.random(50) < 0.7
    words = words_of(taken.reshape(-1), m)
    assert [int(word) for word in words] == [sum(1 << i for i in np.flatnonzero(row).tolist()) for row in taken]
    assert most_taken(words) == 1
    masks = masks_of(1, m)
    assert len(masks) == mask_count(1, m) == m + 1
    ranks = ranks_of(words, masks)
    assert np.array_equal(masks[ranks], words)
    assert np.array_equal(taken_of(ranks, masks, m), taken.reshape(-1))


def test_blocks_end_where_they_may() -> None:
    codes = sparse((300, 1200), 2, 4, 1)  # more than one block
    assert there_and_back_quickly(codes)
    assert there_and_back_quickly(np.pad(codes.reshape(-1), (0, 3), constant_values=1))


def there_and_back_quickly(codes: Any) -> bool:
    spec, stored = encode_codes(codes)
    found = decode_codes(spec, codes.shape, np.int8, [unpacked(run.data, run.raw) for run in stored])
    return np.array_equal(found, codes) and spec.groups is not None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"n": 5}, "groups of 5:4"),
        ({"zero": 9}, "around 9"),
        ({"axis": 2}, "no whole groups"),
        ({"m": 3}, "no whole"),
        ({"nonzeros": 17}, "17 nonzeros"),
        ({"n": 30, "m": 60, "axis": None}, "nonzeros in 1 groups"),
    ],
)  # fmt: skip
def test_groups_that_cannot_be_are_refused(change: dict[str, Any], told: str) -> None:
    groups = Groups(**({"axis": 1, "n": 2, "m": 4, "zero": 0, "nonzeros": 8} | change))
    with pytest.raises(ValueError, match=told):
        run_sizes(Codes(low=-8, high=7, groups=groups, streams=((0, 0),)), (4, 8))


@pytest.mark.parametrize(("nonzeros", "told"), [(2, "more values"), (4, "fewer values")])
def test_masks_and_values_must_agree(nonzeros: int, told: str) -> None:
    spec = Codes(low=-1, high=5, groups=Groups(axis=1, n=2, m=4, zero=0, nonzeros=nonzeros), streams=((0, 0),))
    runs = [np.array([8 + 11 * 2], np.uint8), np.array([0] * run_sizes(spec, (1, 8))[1], np.uint8)]
    with pytest.raises(ValueError, match=told):
        decode_codes(spec, (1, 8), np.int8, runs)


def test_a_group_that_is_filled_up_holds_zeros() -> None:
    spec = Codes(low=0, high=3, groups=Groups(axis=None, n=4, m=4, zero=0, nonzeros=1), streams=((0, 0),))
    runs = [np.array([8], np.uint8), np.array([0], np.uint8)]  # the fourth place, of three codes
    with pytest.raises(ValueError, match="last group"):
        decode_codes(spec, (3,), np.int8, runs)
