"""The header of a packed file: what its sections hold. Every number in it is bounded by another one that is counted.

JSON in one canonical form: a header that says the same in other bytes (twice the same key, a space, 1.0) is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field

MAX_BYTES = 2**24  # of a header, unpacked
MAX_SIZE = 2**48  # bytes or elements of anything
# What a file unpacks to: more than this and so many times its own size is no model, but a bomb.
ALLOWANCE, INFLATION = 2**30, 1024
_LIST = 8  # bytes for each list, at least: a run is one, `[1,1],`, and what has 16 of them has names of keys besides

Size = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Sizes = Annotated[tuple[Size, ...], FailFast()]  # everywhere: an error for each of millions of items takes gigabytes
Shape = Annotated[Sizes, Field(max_length=64)]
Name = Annotated[str, Field(max_length=1000)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Index = Annotated[int, Field(ge=0, le=MAX_BYTES)]
Code = Annotated[int, Field(ge=-128, le=255)]
Pattern = Annotated[str, Field(pattern=r"^[1-9][0-9]?:[1-9][0-9]?$")]
Stream = tuple[Size, Size]  # (stored, unpacked) bytes
Streams = Annotated[tuple[Stream, ...], FailFast(), Field(min_length=1, max_length=16)]


class Part(BaseModel):
    """A part of the header: unknown keys and other types refused, values immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Groups(Part):
    """Codes in groups, most of whose places hold `zero`.

    Args:
        axis: That groups run along; None: along the codes as they lie.
        n: The most places of a group that hold something else.
        m: Places of a group.
        zero: The value that is left out.
        nonzeros: How many codes are something else.
    """

    axis: Annotated[int, Field(ge=0, lt=64)] | None
    n: Annotated[int, Field(ge=1, le=64)]
    m: Annotated[int, Field(ge=1, le=64)]
    zero: Code
    nonzeros: Size


class Codes(Part):
    """Small integers from `low` to `high`: `layouts.py`."""

    low: Code
    high: Code
    groups: Groups | None
    streams: Streams


class Numbers(Part):
    """Elements of any type as bytes, in one run or in one for each byte of an element: `numbers.py`."""

    planes: Annotated[int, Field(ge=1, le=16)]
    streams: Streams


class Section(Part):
    """Bytes of the file, one section after the other; their sha256."""

    stored: Size
    sha256: Digest


class CodedEntry(Part):
    """A coded tensor: codes, then scales, float32 [shape[axis]]."""

    name: Name
    section: Index
    shape: Shape
    bits: Annotated[int, Field(ge=2, le=8)]
    axis: Annotated[int, Field(ge=0, lt=64)]
    pattern: Pattern | None
    codes: Codes
    scale: Numbers


class TensorEntry(Part):
    """Any other tensor; of ONNX small integers are `codes`, everything else is `numbers`."""

    name: Name
    section: Index
    shape: Shape
    dtype: Annotated[str, Field(max_length=20)]
    codes: Codes | None
    numbers: Numbers | None


class FileEntry(Part):
    """A file that is given back: `gaps[i]` bytes of `rest` before its i-th tensor, and what is left of it at the end.

    Its tensors are the next ones of the header's list.
    """

    name: Name
    size: Size
    sha256: Digest
    section: Index
    gaps: Sizes
    rest: Numbers


class Header(Part):
    """Of a model: `coded` and `tensors`, each by name. Of ONNX: `files`, the model's first, and their `tensors`."""

    content: Literal["model", "onnx"]
    sections: Annotated[tuple[Section, ...], FailFast()]
    coded: Annotated[tuple[CodedEntry, ...], FailFast()]
    tensors: Annotated[tuple[TensorEntry, ...], FailFast()]
    files: Annotated[tuple[FileEntry, ...], FailFast()]

    def to_json(self) -> bytes:
        """Return the canonical form."""
        return self.model_dump_json().encode()

    @classmethod
    def from_json(cls, text: bytes) -> Header:
        """Return what the canonical form says, with memory for what a header may hold and not for what JSON may.

        Raises:
            ValueError: If it is another form, or breaks a bound.
        """
        if text.count(b"[") * _LIST > len(text):
            raise ValueError("its header holds more lists than a header has")
        try:  # refused at the first strange object; numbers, which may be of any length, become a bool
            json.loads(text.decode(), object_pairs_hook=_require_keys, parse_int=bool, parse_float=bool)
        except RecursionError:
            raise ValueError("its header is nested deeper than a header is") from None
        header = cls.model_validate_json(text)
        if header.to_json() != text:
            raise ValueError("its header is not in the form in which headers are written")
        return header

    @property
    def entries(self) -> list[CodedEntry | TensorEntry | FileEntry]:
        """All that sections hold, in the order in which they are first held."""
        return [*self.coded, *self.tensors, *self.files]


_KEYS = {
    tuple(part.model_fields)
    for part in (Header, Section, CodedEntry, TensorEntry, FileEntry, Codes, Groups, Numbers)
}  # fmt: skip


def _require_keys(pairs: list[tuple[str, object]]) -> None:
    """Raise unless an object has the keys of a part, in their order; nothing of it is kept."""
    if (keys := tuple(key for key, _ in pairs)) not in _KEYS:
        shown = ", ".join(key[:30] for key in keys[:10])
        raise ValueError(f"its header holds an object with the {len(keys)} keys {{{shown}}}, which no part of it has")


def streams_of(entry: CodedEntry | TensorEntry | FileEntry) -> list[tuple[int, int]]:
    """Return (stored, unpacked) bytes of what a section holds, in order."""
    parts: Iterable[Codes | Numbers | None]
    if isinstance(entry, CodedEntry):
        parts = (entry.codes, entry.scale)
    elif isinstance(entry, TensorEntry):
        parts = (entry.codes, entry.numbers)
    else:
        parts = (entry.rest,)
    return [stream for part in parts if part is not None for stream in part.streams]


def elements_of(shape: tuple[int, ...]) -> int:
    """Return how many elements a shape has.

    Raises:
        ValueError: If they are more than anything has.
    """
    if (elements := math.prod(shape)) > MAX_SIZE:
        raise ValueError(f"a tensor of shape {shape}")
    return elements
