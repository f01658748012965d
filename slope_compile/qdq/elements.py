"""The elements of a tensor from its bytes, a chunk at a time: 2- and 4-bit codes unpacked, half types widened.

What is held at once is the array that is returned and some chunks of `CHUNK` bytes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slope_compile.qdq.wire import MAX_VARINT

CHUNK = 1 << 16  # bytes: all that is made of a chunk fits the fastest caches
_WHOLE: dict[str, np.dtype[Any]] = {
    "INT8": np.dtype(np.int8), "UINT8": np.dtype(np.uint8), "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"),
    "FLOAT": np.dtype("<f4"), "DOUBLE": np.dtype("<f8"),
}  # fmt: skip
_WIDTH = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4}  # bits
VARINT_BYTES = {"FLOAT16": 2, "BFLOAT16": 2, "INT32": 4}  # of an element of int32_data; others: 1


class Bytes(Protocol):
    """Where bytes come from: a file at its place, or what decodes another form of them."""

    def readinto(self, buffer: Any, /) -> int | None:
        """Fill a buffer with the next bytes; return how many there were."""


def read_elements(source: Bytes, dtype: str, elements: int) -> npt.NDArray[Any]:
    """Return the elements, flat: 2-, 4- and 8-bit integers as int8 or uint8, half types as float32.

    Args:
        source: Gives the bytes as ONNX's `raw_data` has them: little-endian, small integers packed, the first one in
            the low bits.
        dtype: ONNX's name of the element type.
        elements: How many there are.

    Raises:
        EOFError: If the bytes end before.
        ValueError: If they are not what they should be.
    """
    if dtype in _WHOLE:
        whole = np.empty(elements, _WHOLE[dtype])
        _fill(source, whole.view(np.uint8))
        return whole.astype(whole.dtype.newbyteorder("="), copy=False)
    if dtype in _WIDTH:
        return _unpacked(source, _WIDTH[dtype], dtype.startswith("U"), elements)
    return _widened(source, dtype, elements)


def _unpacked(source: Bytes, bits: int, unsigned: bool, elements: int) -> npt.NDArray[Any]:
    """Return packed integers of 2 or 4 bits, one a byte."""
    each = 8 // bits
    packed = -(-elements // each)
    out = np.empty(packed * each, np.uint8)
    word = np.dtype(f"<u{each}")
    mask = word.type(int.from_bytes(bytes([2**bits - 1]) * each, "little"))
    buffer = np.empty(CHUNK, np.uint8)
    for start in range(0, packed, CHUNK):
        chunk = buffer[: min(CHUNK, packed - start)]
        _fill(source, chunk)
        spread = chunk.astype(word)
        for index in range(1, each):  # the next integer goes to the next byte of the word
            spread |= chunk.astype(word) << word.type((8 - bits) * index)
        spread &= mask
        made = spread.view(np.uint8)
        if not unsigned:  # from two's complement of b bits to that of 8
            made ^= 2 ** (bits - 1)
            made -= 2 ** (bits - 1)
        out[start * each : start * each + made.size] = made
    return out[:elements] if unsigned else out[:elements].view(np.int8)


def _widened(source: Bytes, dtype: str, elements: int) -> npt.NDArray[np.float32]:
    out = np.empty(elements, np.float32)
    buffer = np.empty(CHUNK, np.dtype("<u2"))
    for start in range(0, elements, CHUNK):
        chunk = buffer[: min(CHUNK, elements - start)]
        _fill(source, chunk.view(np.uint8))
        if dtype == "FLOAT16":
            out[start : start + chunk.size] = chunk.view("<f2")
        else:  # BFLOAT16 is the upper half of a float32
            out[start : start + chunk.size] = (chunk.astype(np.uint32) << 16).view(np.float32)
    return out


def _fill(source: Bytes, buffer: npt.NDArray[np.uint8]) -> None:
    view = memoryview(buffer)  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        got = source.readinto(view[done:])
        if not got:
            raise EOFError(f"{len(view) - done} bytes are missing")
        done += got


class Varints:
    """The bytes that numbers of `int32_data` stand for: protobuf's variable-length integers.

    Args:
        source: Gives the encoded integers.
        length: How many bytes they take.
        width: How many bytes an element has: the lowest ones of its integer.
    """

    def __init__(self, source: Bytes, length: int, width: int) -> None:
        self._source, self._left = source, length
        self._type = np.dtype(f"<u{width}")
        self._rest = np.empty(0, np.uint8)  # of an integer that the chunk cuts
        self._made = np.empty(0, np.uint8)

    def readinto(self, buffer: Any, /) -> int:
        """Fill a buffer with decoded bytes.

        Raises:
            ValueError: If an integer is too long or cut off.
        """
        while not self._made.size and self._left:
            self._decode()
        count = min(len(buffer), self._made.size)
        buffer[:count] = self._made[:count].data
        self._made = self._made[count:]
        return count

    @property
    def done(self) -> bool:
        """Whether all were read."""
        return not self._made.size and not self._left

    def _decode(self) -> None:
        chunk = np.empty(min(CHUNK, self._left), np.uint8)
        _fill(self._source, chunk)
        self._left -= chunk.size
        encoded = np.concatenate([self._rest, chunk])
        ends = np.flatnonzero(encoded < 0x80)
        begins = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
        lengths = ends + 1 - begins
        used = int(ends[-1]) + 1 if ends.size else 0
        self._rest = encoded[used:].copy()
        if self._rest.size >= MAX_VARINT or lengths.max(initial=0) > MAX_VARINT or (self._rest.size and not self._left):
            raise ValueError("its integers are cut off")
        values = np.zeros(ends.size, np.uint32)
        for index in range(5):  # 7 bits each: what is above 32 bits is the sign, repeated
            there = lengths > index
            values[there] |= (encoded[begins[there] + index] & 0x7F).astype(np.uint32) << np.uint32(7 * index)
        self._made = values.astype(self._type).view(np.uint8)
