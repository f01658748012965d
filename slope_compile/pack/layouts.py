"""Small integers as runs of byte symbols and back.

Letters: B values from `low` to `high`, (n, m) at most n values other than `zero` in every group of m, G groups.

    dense     B-ary digits of the codes, in their order
    grouped   a digit for each group, which of its m places are not zero: one of sum_{i<=n} C(m, i) masks, by rank;
              then the values that are not zero, digits of base B - 1

Groups run along an axis, or along the codes as they lie (axis None), filled up with zeros to a whole group. All that
fit are made and stored, and the smallest is kept: the reader is told which.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.pack.digits import Bytes, join_digits, joined_size, looked_up, split_digits
from slope_compile.pack.groups import (
    MAX_MASKS,
    blocks,
    mask_count,
    masks_of,
    most_taken,
    ranks_of,
    taken_of,
    words_of,
)
from slope_compile.pack.header import Codes, Groups
from slope_compile.pack.streams import Stored, stored

Small = npt.NDArray[Any]  # int8 or uint8
GROUP_SIZES = (4, 8, 16)  # tried along every axis
FLAT_GROUP = 4
_Made = tuple[Codes, list[Stored]]


def encode_codes(codes: Small, zero: int = 0, sizes: tuple[int, ...] = GROUP_SIZES) -> _Made:
    """Return the layout that makes codes smallest, and the runs that are stored.

    Args:
        codes: int8 or uint8, any shape.
        zero: The value that sparse codes mostly hold.
        sizes: Group sizes to try along every axis.
    """
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    made = [_dense(codes, low, high)]
    if low < high and low <= zero <= high:
        along = [_grouped(codes, low, high, axis, zero, sizes) for axis in range(codes.ndim)]
        made += [found for found in along if found is not None]
        if len(made) == 1 and (flat := _grouped(codes, low, high, None, zero, (FLAT_GROUP,))) is not None:
            made.append(flat)
    return min(made, key=lambda one: sum(len(run.data) for run in one[1]))


def decode_codes(spec: Codes, shape: tuple[int, ...], dtype: Any, runs: list[Bytes]) -> Small:
    """Return the codes that `encode_codes` was given.

    Args:
        spec: The layout.
        shape: Of the codes.
        dtype: np.int8 or np.uint8.
        runs: The unpacked runs.

    Raises:
        ValueError: If the runs do not hold such codes.
    """
    if spec.groups is None:
        digits = split_digits(runs[0], spec.high - spec.low + 1, math.prod(shape))
        return looked_up(_values(spec, dtype), digits).reshape(shape)
    return _ungrouped(spec, spec.groups, shape, dtype, runs)


def run_sizes(spec: Codes, shape: tuple[int, ...]) -> list[int]:
    """Return how many bytes each run of a layout has, unpacked.

    Raises:
        ValueError: If such codes cannot be laid out so.
    """
    base, elements = spec.high - spec.low + 1, math.prod(shape)
    if not 1 <= base <= 256:
        raise ValueError(f"codes from {spec.low} to {spec.high}")
    groups = spec.groups
    if groups is None:
        return [joined_size(elements, base)]
    if not (1 <= groups.n <= groups.m and base > 1 and spec.low <= groups.zero <= spec.high):
        raise ValueError(f"groups of {groups.n}:{groups.m} around {groups.zero}")
    if groups.axis is not None and not (groups.axis < len(shape) and shape[groups.axis] % groups.m == 0):
        raise ValueError(f"shape {shape} has no whole groups of {groups.m} along axis {groups.axis}")
    count, masks = -(-elements // groups.m), mask_count(groups.n, groups.m)
    if masks > MAX_MASKS or groups.nonzeros > min(elements, count * groups.n):
        raise ValueError(f"{groups.nonzeros} nonzeros in {count} groups of {groups.n}:{groups.m}")
    return [joined_size(count, masks), joined_size(groups.nonzeros, base - 1)]


def _dense(codes: Small, low: int, high: int) -> _Made:
    digits = looked_up(_digits(low, high, None), codes.reshape(-1).view(np.uint8))
    return _codes(low, high, None, [stored(join_digits(digits, high - low + 1))])


def _grouped(codes: Small, low: int, high: int, axis: int | None, zero: int, sizes: tuple[int, ...]) -> _Made | None:
    """Return codes in the groups that make their masks smallest; None where none leaves a place empty."""
    fitting = [m for m in dict.fromkeys(sizes) if axis is None or codes.shape[axis] % m == 0]
    if not fitting:
        return None
    flat = _flat(codes, axis)
    found = [one for m in fitting if (one := _masks(flat, m, zero, whole=axis is None)) is not None]
    if not found:
        return None
    n, m, masks = min(found, key=lambda one: len(one[2].data))
    values = _kept(flat, zero, _digits(low, high, zero))
    groups = Groups(axis=axis, n=n, m=m, zero=zero, nonzeros=values.size)
    return _codes(low, high, groups, [masks, stored(join_digits(values, high - low))])


def _masks(flat: Small, m: int, zero: int, whole: bool) -> tuple[int, int, Stored] | None:
    """Return (n, m, stored ranks) of groups of m; None where too many masks are possible, or all, unless `whole`."""
    padded = -(-flat.size // m) * m
    words, n = [], 1
    for begin, stop in blocks(padded, m):
        words.append(words_of(_taken(flat, begin, stop, zero), m))
        n = max(n, most_taken(words[-1]))
        if mask_count(n, m) > MAX_MASKS or (n == m and not whole):
            return None
    masks = masks_of(n, m)
    ranks = np.concatenate([ranks_of(part, masks) for part in words])
    return n, m, stored(join_digits(ranks, len(masks)))


def _taken(flat: Small, begin: int, stop: int, zero: int) -> npt.NDArray[np.bool_]:
    """Return which codes are not zero, those behind the last one included: they are."""
    taken = np.zeros(stop - begin, np.bool_)
    part = flat[begin:stop]
    np.not_equal(part, zero, out=taken[: part.size])
    return taken


def _kept(flat: Small, zero: int, table: Bytes) -> Bytes:
    """Return the digits of the codes that are not zero."""
    parts = [looked_up(table, part[part != zero].view(np.uint8)) for part in _parts(flat)]
    return np.concatenate(parts)


def _parts(flat: Small) -> list[Small]:
    return [flat[begin:stop] for begin, stop in blocks(flat.size, 1)]


def _ungrouped(spec: Codes, groups: Groups, shape: tuple[int, ...], dtype: Any, runs: list[Bytes]) -> Small:
    m, axis, elements = groups.m, groups.axis, math.prod(shape)
    masks = masks_of(groups.n, m)
    ranks = split_digits(runs[0], len(masks), -(-elements // m))
    values = looked_up(_values(spec, dtype), split_digits(runs[1], spec.high - spec.low, groups.nonzeros))
    flat = np.full(ranks.size * m, groups.zero, dtype)
    done = 0
    for begin, stop in blocks(flat.size, m):
        taken = taken_of(ranks[begin // m : stop // m], masks, m)
        count = int(np.count_nonzero(taken))
        if done + count > values.size:
            raise ValueError("its masks keep more values than it has")
        flat[begin:stop][taken] = values[done : done + count]
        done += count
    if done != values.size:
        raise ValueError("its masks keep fewer values than it has")
    if (flat[elements:] != groups.zero).any():
        raise ValueError("its last group is not filled up with zeros")
    if axis is None:
        return flat[:elements].reshape(shape)
    moved = flat.reshape(*shape[:axis], *shape[axis + 1 :], shape[axis])
    return np.ascontiguousarray(np.moveaxis(moved, -1, axis))


def _codes(low: int, high: int, groups: Groups | None, runs: list[Stored]) -> _Made:
    streams = tuple((len(run.data), run.raw) for run in runs)
    return Codes(low=low, high=high, groups=groups, streams=streams), runs


def _flat(codes: Small, axis: int | None) -> Small:
    """Return codes flat, the axis last."""
    return np.ascontiguousarray(codes if axis is None else np.moveaxis(codes, axis, -1)).reshape(-1)


def _digits(low: int, high: int, zero: int | None) -> Bytes:
    """Return code, as the byte it is -> its digit: values ascending from `low`, without `zero`."""
    table = np.zeros(256, np.uint8)
    for digit, value in enumerate(value for value in range(low, high + 1) if value != zero):
        table[value % 256] = digit
    return table


def _values(spec: Codes, dtype: Any) -> Small:
    """Return digit -> code, 256 entries."""
    zero = None if spec.groups is None else spec.groups.zero
    values = [value for value in range(spec.low, spec.high + 1) if value != zero]
    return np.array(values + [0] * (256 - len(values)), dtype)
