"""A safetensors file read tensor by tensor: nothing is mapped, so that what is held is the tensor that is asked for.

safetensors itself judges the header (sizes, types, offsets without gaps or overlaps); the numbers are read at their
offsets. Format: 8 bytes length of the header, the header as JSON, then the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

TYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_), "U8": np.dtype(np.uint8), "I8": np.dtype(np.int8), "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"), "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U64": np.dtype("<u8"),
    "F64": np.dtype("<f8"),
}  # fmt: skip
FLOATS = ("F16", "BF16", "F32", "F64")
_LENGTH = 8  # bytes


@dataclass(frozen=True)
class Entry:
    """Where a tensor is.

    Args:
        dtype: safetensors' name of its type.
        shape: Of the tensor.
        offset: In the file, bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


class TensorFile:
    """A safetensors file.

    Args:
        path: The file.

    Attributes:
        entries: Its tensors by name.
        metadata: Its header's own entries.

    Raises:
        OSError: If it is missing or cannot be read.
        ValueError: If it is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="numpy") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(_LENGTH), "little")
            header = json.loads(raw.read(length))
        start = _LENGTH + length
        self.entries: dict[str, Entry] = {
            name: Entry(row["dtype"], tuple(row["shape"]), start + row["data_offsets"][0])
            for name, row in header.items()
            if name != "__metadata__"
        }

    def read(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor; BF16 as float32.

        Raises:
            KeyError: If there is none of that name.
            ValueError: If its type is not read here, or the file was cut off since it was opened.
        """
        entry = self.entries[name]
        parts = list(self.blocks(name, max(1, entry.elements)))
        return (parts[0] if parts else np.empty(0, _shown(entry.dtype))).reshape(entry.shape)

    def blocks(self, name: str, most: int) -> Iterator[npt.NDArray[Any]]:
        """Yield a tensor's numbers, flat, at most so many at a time; BF16 as float32.

        Raises:
            KeyError: As `read`.
            ValueError: As `read`.
        """
        entry = self.entries[name]
        if entry.dtype not in TYPES:
            raise ValueError(f"{name} has type {entry.dtype}, which is not read here")
        kind = TYPES[entry.dtype]
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            for start in range(0, entry.elements, most):
                block = np.empty(min(most, entry.elements - start), kind)
                if file.readinto(memoryview(block.view(np.uint8))) != block.nbytes:  # type: ignore[arg-type]
                    raise ValueError(f"{name} is cut off")
                yield (block.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else block


def _shown(dtype: str) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype == "BF16" else TYPES[dtype]
