"""An ONNX file without its big tensors: their bytes stay in the file, and what is parsed says where.

protobuf reads a file whole, and holds every tensor in it. Here the wire format is walked first (tags and lengths, in
blocks of `BLOCK` bytes), and the numbers of each big tensor are taken out: `location` says `HERE`, `offset` and
`length` say where in the file they are. What the walk does not understand stays as it is, for protobuf to judge; so
does a tensor that is not written in the usual way (numbers in two fields, external data as well). So what is read here
is what a parser of the whole file would read.

Wire format: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import IO, NamedTuple

from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    StringStringEntryProto,
    TensorProto,
)

# A location that no file has: the model's own file. Drawn anew by every process, so that no file can say it of itself.
HERE = f"\0{secrets.token_hex(16)}"
VARINTS = "varints"  # key of a tensor whose numbers are protobuf's variable-length integers (`int32_data`)
BIG = 1024  # bytes from which on numbers stay in the file
BLOCK = 1 << 16  # bytes read at once
MAX_NESTED = 100  # messages inside each other, which is protobuf's own limit
MAX_VARINT = 10  # bytes

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; groups (3, 4) are in no ONNX file


class _OddError(Exception):
    """Raised where the bytes are no message as ONNX writes it."""


class _Field(NamedTuple):
    """One field of a message, as offsets in the file: its tag, its contents, and the end of both."""

    number: int
    wire: int
    at: int
    begin: int
    stop: int

    @property
    def bytes(self) -> int:
        """How long the contents are."""
        return self.stop - self.begin


_Piece = bytes | tuple[int, int]  # what is written anew, or from where to where the file is copied


def _numbers(message: type[Message], **names: str) -> dict[int, str]:
    """Return field number -> what is inside, from ONNX's own description of its messages."""
    return {message.DESCRIPTOR.fields_by_name[name].number: kind for name, kind in names.items()}


def _number(message: type[Message], name: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[name].number)


# Messages on the way to a tensor. A sparse tensor is no weight that is read here: it stays as it is.
_INSIDE = {
    "model": _numbers(ModelProto, graph="graph", functions="function"),
    "graph": _numbers(GraphProto, node="node", initializer="tensor"),
    "function": _numbers(FunctionProto, node="node", attribute_proto="attribute"),
    "node": _numbers(NodeProto, attribute="attribute"),
    "attribute": _numbers(AttributeProto, t="tensor", g="graph", tensors="tensor", graphs="graph"),
}
_LONE = _number(AttributeProto, "t")  # protobuf merges several of these into one tensor
_RAW, _INT32 = _number(TensorProto, "raw_data"), _number(TensorProto, "int32_data")
_FLOATS, _DOUBLES = _number(TensorProto, "float_data"), _number(TensorProto, "double_data")
_TYPE = _number(TensorProto, "data_type")
_EXTERNAL = {_number(TensorProto, "external_data"), _number(TensorProto, "data_location")}
_DATA = {
    _number(TensorProto, name)
    for name in ("raw_data", "int32_data", "float_data", "double_data", "int64_data", "uint64_data", "string_data")
}
_AS_RAW = {_FLOATS: TensorProto.FLOAT, _DOUBLES: TensorProto.DOUBLE}  # packed: the same bytes as raw_data
_SHORT = {
    getattr(TensorProto, name)
    for name in ("INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "FLOAT16", "BFLOAT16", "INT32")
}  # types whose numbers may be in int32_data


def without_big_tensors(file: IO[bytes], size: int) -> bytes:
    """Return a serialized ModelProto whose big tensors are references into the file.

    Args:
        file: The ONNX file.
        size: How many bytes it has.
    """
    source = _Source(file, size)
    pieces = _shrunk(source, "model", 0, size, 0) or [(0, size)]
    return b"".join(piece if isinstance(piece, bytes) else source.copy(*piece) for piece in pieces)


class _Source:
    """Bytes of a file by offset, a block at a time."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self.size = file, size
        self._start, self._block = 0, b""

    def copy(self, begin: int, stop: int) -> bytes:
        self._file.seek(begin)
        return self._file.read(stop - begin)

    def fields(self, begin: int, stop: int) -> Iterator[_Field]:
        """Yield the fields of a message."""
        at = begin
        while at < stop:
            tag, start = self._varint(at, stop)
            number, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                length, start = self._varint(start, stop)
                end = start + length
            elif wire == _VARINT:
                _, end = self._varint(start, stop)
            elif wire in (_FIXED32, _FIXED64):
                end = start + (4 if wire == _FIXED32 else 8)
            else:
                raise _OddError
            if end > stop or not number:
                raise _OddError
            yield _Field(number, wire, at, start, end)
            at = end

    def value(self, field: _Field) -> int:
        """Return the number of a field of a variable-length integer."""
        return self._varint(field.begin, field.stop)[0]

    def _varint(self, at: int, stop: int) -> tuple[int, int]:
        """Return an integer and where it ends."""
        if not self._start <= at <= self._start + len(self._block) - MAX_VARINT:
            self._start, self._block = at, self.copy(at, min(at + BLOCK, self.size))
        value = 0
        first = at - self._start
        for index, byte in enumerate(self._block[first : min(first + MAX_VARINT, stop - self._start)]):
            value |= (byte & 0x7F) << 7 * index
            if byte < 0x80:
                return value, at + index + 1
        raise _OddError


def _shrunk(source: _Source, kind: str, begin: int, stop: int, depth: int) -> list[_Piece] | None:
    """Return a message without its big tensors; None where it has none, or is not understood."""
    if depth > MAX_NESTED:
        return None
    try:
        return _tensor(source, begin, stop) if kind == "tensor" else _message(source, kind, begin, stop, depth)
    except _OddError:
        return None


def _message(source: _Source, kind: str, begin: int, stop: int, depth: int) -> list[_Piece] | None:
    pieces: list[_Piece] = []
    copied, lone = begin, 0
    inside = _INSIDE[kind]
    for field in source.fields(begin, stop):
        lone += kind == "attribute" and field.number == _LONE
        if lone > 1:
            return None
        if field.wire != _BYTES or field.number not in inside or field.bytes < BIG:
            continue
        found = _shrunk(source, inside[field.number], field.begin, field.stop, depth + 1)
        if found is not None:
            pieces += [(copied, field.at), _header(field.number, _length(found)), *found]
            copied = field.stop
    return [*pieces, (copied, stop)] if pieces else None


def _tensor(source: _Source, begin: int, stop: int) -> list[_Piece] | None:
    """Return a tensor whose numbers are a reference; None where they are few, or not all in one field."""
    data: list[_Field] = []
    kind = None
    for field in source.fields(begin, stop):
        if field.number in _EXTERNAL:
            return None
        if field.number in _DATA:
            data.append(field)
        elif field.number == _TYPE:
            if field.wire != _VARINT:
                return None
            kind = source.value(field)
    if len(data) != 1 or data[0].wire != _BYTES or data[0].bytes < BIG:
        return None
    (numbers,) = data
    varints = numbers.number == _INT32
    if not (numbers.number == _RAW or (varints and kind in _SHORT) or _AS_RAW.get(numbers.number) == kind):
        return None
    entries = {"location": HERE, "offset": str(numbers.begin), "length": str(numbers.bytes)}
    reference = TensorProto(
        data_location=TensorProto.EXTERNAL,
        external_data=[
            StringStringEntryProto(key=key, value=value)
            for key, value in (entries | ({VARINTS: "1"} if varints else {})).items()
        ],
    )
    return [(begin, numbers.at), (numbers.stop, stop), reference.SerializeToString()]


def _length(pieces: list[_Piece]) -> int:
    return sum(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)


def _header(number: int, length: int) -> bytes:
    """Return the tag and length of a field of bytes."""
    return _encoded(number << 3 | _BYTES) + _encoded(length)


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
