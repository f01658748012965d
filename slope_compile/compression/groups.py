"""Groups of an n:m pattern, counted a block at a time: a tensor may be as big as memory, what is made of it may not.

Every temporary array is of one block, at most `BLOCK` elements; a block holds whole groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK = 1 << 18  # elements: a block, and what is made of it, fit a core's own cache
_WORDS: dict[int, np.dtype[Any]] = {
    2: np.dtype(np.uint16),
    4: np.dtype(np.uint32),
    8: np.dtype(np.uint64),
}  # m bytes as one number


class Groups(NamedTuple):
    """What counting gave.

    Attributes:
        broken: Groups with more than n nonzeros.
        total: All groups.
        first: Index of the first broken group's first element; None where none is broken.
        worst: Nonzeros of that group.
    """

    broken: int
    total: int
    first: tuple[int, ...] | None
    worst: int


def count_groups(array: npt.NDArray[Any], n: int, m: int, axis: int) -> Groups:
    """Count the groups of m along an axis that hold more than n nonzeros.

    Args:
        array: Any numeric array; axis `axis` has a length divisible by m.
        n: Nonzeros that a group may hold.
        m: Group size, at most 255.
        axis: The reduction axis.

    Raises:
        ValueError: If m does not divide the axis, or is not within 1 to 255.
    """
    axis %= array.ndim
    if not 1 <= m <= 255 or array.shape[axis] % m:
        raise ValueError(f"axis {axis} of shape {array.shape} has no whole groups of {m}")
    order = sorted(range(array.ndim), key=lambda a: -abs(array.strides[a]))  # as it lies in memory, whatever view it is
    along, broken = order.index(axis), 0
    found: tuple[tuple[int, ...], int] | None = None
    laid = array.transpose(order)
    for where in blocks(laid.shape, along, m):
        counts = _nonzeros(laid[where], m, along)
        over = counts > n
        if here := int(np.count_nonzero(over)):
            broken += here
            place = _first(over, where, order, axis, m, counts)
            found = place if found is None else min(found, place)
    first, worst = found or (None, 0)
    return Groups(broken, array.size // m, first, worst)


def blocks(
    shape: tuple[int, ...], axis: int | None = None, m: int = 1, most: int = BLOCK, longest: int | None = None
) -> Iterator[tuple[slice, ...]]:
    """Yield slices that cut an array into blocks, the first axes first.

    Args:
        shape: Of the array, the axis of the largest stride first.
        axis: The axis of which a block gets whole groups.
        m: Elements of a group.
        most: Elements of a block, if a group has not more.
        longest: Side of a block; None: as long as the axis.
    """
    if 0 in shape:
        return
    steps = [length if longest is None else min(length, longest) for length in shape]
    for index in range(len(shape)):
        rest = math.prod(steps) // steps[index]
        group = m if index == axis else 1
        steps[index] = min(steps[index], max(group, most // rest // group * group))
    cuts = [[slice(i, min(i + s, n)) for i in range(0, n, s)] for n, s in zip(shape, steps, strict=True)]
    yield from itertools.product(*cuts)


def _nonzeros(block: npt.NDArray[Any], m: int, axis: int) -> npt.NDArray[np.uint8]:
    """Return the nonzeros of every group, the shape of the block with the axis divided by m."""
    before, length, after = block.shape[:axis], block.shape[axis], math.prod(block.shape[axis + 1 :])
    nonzero = np.ascontiguousarray(block != 0).view(np.uint8)
    if after == 1 and m in _WORDS:  # the bytes of a group lie side by side: add them up in one multiplication
        words = nonzero.reshape(-1).view(_WORDS[m])
        ones = words.dtype.type(int.from_bytes(b"\1" * m, "little"))
        count: npt.NDArray[np.uint8] = ((words * ones) >> words.dtype.type(8 * (m - 1))).astype(np.uint8)
    else:
        parts = nonzero.reshape(math.prod(before), length // m, m, after)
        count = parts[:, :, 0].copy()
        for j in range(1, m):  # m adds over whole slices: a sum over the short axis would run m-element loops
            count += parts[:, :, j]
    shaped: npt.NDArray[np.uint8] = count.reshape(*before, length // m, *block.shape[axis + 1 :])
    return shaped


def _first(
    over: npt.NDArray[np.bool_], where: tuple[slice, ...], order: list[int], axis: int, m: int, counts: Any
) -> tuple[tuple[int, ...], int]:
    """Return the index in the array of the first broken group of a block, and its count."""
    back = np.argsort(order)  # so that the first one is the first in the array's own order
    over, counts = over.transpose(back), counts.transpose(back)
    place = np.unravel_index(int(np.argmax(over)), over.shape)
    starts = [where[index].start for index in back]
    index = tuple(int(s + (i * m if a == axis else i)) for a, (s, i) in enumerate(zip(starts, place, strict=True)))
    return index, int(counts[place])
