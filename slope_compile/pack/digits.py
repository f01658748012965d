"""Digits of a small alphabet, several to a byte: what a byte-wise entropy coder then sees are symbols worth coding.

Letters: B the base, k digits a byte, the largest k with B^k <= 256. The first digit of a byte is the lowest one; the
last byte is filled up with zeros. Of base 1 there is nothing to say: no bytes. For B of 4 and 16 this is how ONNX packs
its 2- and 4-bit integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
BLOCK = 1 << 18  # bytes that are looked up at once


def digits_per_byte(base: int) -> int:
    """Return k of a base from 2 to 256."""
    k = 1
    while base ** (k + 1) <= 256:
        k += 1
    return k


def joined_size(count: int, base: int) -> int:
    """Return how many bytes so many digits take."""
    return 0 if base == 1 else -(-count // digits_per_byte(base))


def join_digits(digits: Bytes, base: int) -> Bytes:
    """Return digits as bytes.

    Args:
        digits: uint8, flat, each below `base`.
        base: 1 to 256.
    """
    if base == 1:
        return np.empty(0, np.uint8)
    k = digits_per_byte(base)
    whole = len(digits) // k
    out = np.zeros(joined_size(len(digits), base), np.uint8)
    for index in range(k):
        factor = np.uint8(base**index % 256)  # k is 1 where the base is 256
        out[:whole] += digits[index : whole * k : k] * factor
    for index, digit in enumerate(digits[whole * k :]):
        out[whole] += digit * np.uint8(base**index)
    return out


def split_digits(joined: Bytes, base: int, count: int) -> Bytes:
    """Return the digits that `join_digits` made bytes of.

    Args:
        joined: uint8, `joined_size(count, base)` of them.
        base: 1 to 256.
        count: How many digits.

    Raises:
        ValueError: If a byte holds no k digits of the base, or the last one is not filled up with zeros.
    """
    if base == 1:
        return np.zeros(count, np.uint8)
    k = digits_per_byte(base)
    if joined.size and int(joined.max()) >= base**k:
        raise ValueError(f"byte {int(joined.max())} holds no {k} digits of base {base}")
    out = np.empty(joined.size * k, np.uint8)
    rest = joined
    for index in range(k - 1):
        higher = rest // np.uint8(base)
        out[index::k] = rest - higher * np.uint8(base)
        rest = higher
    out[k - 1 :: k] = rest
    if out[count:].any():
        raise ValueError("the last byte is not filled up with zeros")
    return out[:count]


def looked_up(table: npt.NDArray[Any], index: Bytes) -> npt.NDArray[Any]:
    """Return table[index] of a table of 256 bytes: numpy would widen the index to 8 bytes each."""
    out = np.empty(index.size, table.dtype)
    for start in range(0, index.size, BLOCK):
        found = index[start : start + BLOCK].tobytes().translate(table.tobytes())
        out[start : start + BLOCK] = np.frombuffer(found, table.dtype)
    return out
