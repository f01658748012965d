"""Groups of m codes, and which of their places are taken: as numbers, as ranks among the masks of n:m, as flags.

Letters: m places of a group, n of them taken at most, G groups. A mask is a number: bit i is place i.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.pack.digits import Bytes, join_digits, looked_up, split_digits

MAX_MASKS = 256  # a rank is a byte
_BLOCK = 1 << 18  # codes: a multiple of 8, and of every m once it is cut to whole groups
_BITS = np.array([byte.bit_count() for byte in range(256)], np.uint8)
_WHOLE = {16: "<u2", 32: "<u4", 64: "<u8"}  # m whose mask is a number of whole bytes
Words = npt.NDArray[Any]  # unsigned


def mask_count(n: int, m: int) -> int:
    """Return how many masks of m places there are with at most n of them taken."""
    return sum(math.comb(m, i) for i in range(n + 1))


def masks_of(n: int, m: int) -> npt.NDArray[np.uint64]:
    """Return every mask of at most n of m places, ascending."""
    masks = [sum(1 << place for place in places) for i in range(n + 1) for places in combinations(range(m), i)]
    return np.array(sorted(masks), np.uint64)


def words_of(taken: npt.NDArray[np.bool_], m: int) -> Words:
    """Return the mask of every group.

    Args:
        taken: bool, flat, whole groups.
        m: Places of a group, at most 64.

    Returns:
        Unsigned [G], of 1, 2, 4 or 8 bytes.
    """
    if 8 % m == 0:
        return split_digits(np.packbits(taken, bitorder="little"), 2**m, taken.size // m)
    if m in _WHOLE:
        return np.packbits(taken, bitorder="little").view(_WHOLE[m])
    bits = np.packbits(taken.reshape(-1, m), axis=1, bitorder="little")
    padded = np.zeros((len(bits), 8), np.uint8)
    padded[:, : bits.shape[1]] = bits
    return padded.reshape(-1).view("<u8")


def most_taken(words: Words) -> int:
    """Return the most places that a group has taken."""
    found = np.flatnonzero(np.bincount(words)) if words.itemsize <= 2 else np.unique(words)
    return int(_BITS[found.astype("<u8").view(np.uint8)].reshape(-1, 8).sum(axis=1).max(initial=0))


def ranks_of(words: Words, masks: npt.NDArray[np.uint64]) -> Bytes:
    """Return the rank of every mask among `masks_of`, where it is."""
    if words.itemsize > 2:
        return np.searchsorted(masks, words.astype(np.uint64)).astype(np.uint8)
    table = np.zeros(2 ** (8 * words.itemsize), np.uint8)
    table[masks] = np.arange(len(masks))
    return looked_up(table, words) if words.itemsize == 1 else table[words]


def taken_of(ranks: Bytes, masks: npt.NDArray[np.uint64], m: int) -> npt.NDArray[np.bool_]:
    """Return which places of the groups are taken, bool, flat; the inverse of `ranks_of(words_of(taken))`."""
    if 8 % m == 0:
        joined = join_digits(masks.astype(np.uint8)[ranks], 2**m)
        bits: npt.NDArray[np.bool_] = np.unpackbits(joined, count=ranks.size * m, bitorder="little").view(np.bool_)
        return bits
    places = (masks[:, None] >> np.arange(m, dtype=np.uint64) & np.uint64(1)).astype(np.bool_)  # [masks, m]
    flags: npt.NDArray[np.bool_] = places[ranks].reshape(-1)
    return flags


def blocks(size: int, m: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, stop) of blocks of whole groups in so many codes, whole bytes of flags each but the last."""
    step = max(1, _BLOCK // (8 * m)) * 8 * m
    for begin in range(0, size, step):
        yield begin, min(begin + step, size)
