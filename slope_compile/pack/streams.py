"""A run of bytes as it is stored: one zstd frame, or the bytes themselves where zstd would not make them fewer.

Level 1 for tensors: their bytes are symbols without repetitions, of which zstd's Huffman coder takes what there is to
take; higher levels search longer and find chance matches that cost more than they save (figures: docs/packing.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

LEVEL = 1
TEXT_LEVEL = 19  # for the header and what is not tensors: small, and full of repetitions


class Stored(NamedTuple):
    """Bytes as they are stored.

    Attributes:
        data: A zstd frame if they are fewer than `raw`, else the bytes themselves.
        raw: How many they are, unpacked.
    """

    data: bytes
    raw: int


def stored(raw: npt.NDArray[np.uint8] | bytes, level: int = LEVEL) -> Stored:
    """Return the shorter one of a zstd frame and the bytes themselves; equal bytes give equal ones."""
    data = raw if isinstance(raw, bytes) else memoryview(np.ascontiguousarray(raw))  # type: ignore[arg-type]
    size = len(data)
    frame = zstandard.ZstdCompressor(level=level, write_checksum=False).compress(data) if size else b""
    return Stored(frame if len(frame) < size else bytes(data), size)


def unpacked(data: Any, raw: int) -> npt.NDArray[np.uint8]:
    """Return the bytes of a stored run, writable; no more than `raw` bytes are ever made.

    Args:
        data: A buffer of what is stored, not longer than `raw`.
        raw: How many bytes it is said to hold.

    Raises:
        ValueError: If it holds other than that.
    """
    if len(data) == raw:
        whole: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8).copy()
        return whole
    try:
        said = zstandard.get_frame_parameters(data).content_size
        if said != raw:
            raise ValueError(f"a zstd frame of {said} bytes stands where {raw} should")
        out: bytes = zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"it is no zstd frame: {error}") from None
    if len(out) != raw:
        raise ValueError(f"a zstd frame holds {len(out)} bytes and says {raw}")
    return np.frombuffer(bytearray(out), np.uint8)
