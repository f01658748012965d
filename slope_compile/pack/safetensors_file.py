"""Writes a safetensors file tensor by tensor, byte for byte as safetensors itself does; it wants them all at once.

Format: 8 bytes length of the header, the header as JSON filled up with spaces to 8 bytes, then the tensors: those of
wide types first, by name among themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from slope_compile.pack.digits import Bytes
from slope_compile.pack.dtypes import MODEL_TYPES
from slope_compile.pack.header import elements_of

RESERVED = "__metadata__"  # in the header of a file: no name of a tensor
# safetensors' own order of types, the last one first in the file
_ORDER = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64",
    "U64",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A tensor that is written when it is its turn."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Bytes]

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return elements_of(self.shape) * MODEL_TYPES[self.dtype].itemsize


def write_safetensors(path: Path, parts: Mapping[str, Part], metadata: Mapping[str, str]) -> None:
    """Write tensors, each read when it is its turn.

    Raises:
        OSError: If the file system refuses.
    """
    order = sorted(parts, key=lambda name: (-_ORDER.index(parts[name].dtype), name))
    header: dict[str, object] = {RESERVED: dict(metadata)} if metadata else {}
    at = 0
    for name in order:
        part = parts[name]
        header[name] = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [at, at + part.size]}
        at += part.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(memoryview(parts[name].read()))  # type: ignore[arg-type]
