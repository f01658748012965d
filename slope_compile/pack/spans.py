"""An ONNX file and its external data cut into tensors and what is between them.

What the file means does not matter here: tensors that share bytes, overlap or leave gaps, in subgraphs, functions or
attributes, are ranges of bytes, and all that is in no range is kept as it is. So every file is given back bit for bit,
and what is known of a range only makes it smaller.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf.message import Message  # type: ignore[import-untyped]
from onnx import TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.pack.dtypes import BYTES, ONNX_BITS
from slope_compile.pack.header import MAX_SIZE
from slope_compile.pack.names import require_file_names
from slope_compile.qdq.tensors import REMEDY, beside, dtype_name, external_location, load_graph
from slope_compile.qdq.wire import BIG, HERE, VARINTS

LONGEST_REST = 1 << 20  # bytes between two tensors that are kept together with the rest of the file
LONGEST_PIECE = 1 << 24  # bytes of what is longer than that and has no meaning here
_NAME = 1000  # characters


@dataclass(frozen=True)
class Span:
    """A range of a file's bytes.

    Attributes:
        begin: Offset in the file.
        size: Bytes.
        name: What the file calls the tensor; may be empty.
        dtype: ONNX's name of its element type, or `BYTES`.
        shape: Of the tensor.
    """

    begin: int
    size: int
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """The offset behind it."""
        return self.begin + self.size


@dataclass(frozen=True)
class Source:
    """A file that is packed, cut into spans that do not overlap.

    Attributes:
        path: The file.
        name: Where it lies, from the model's folder.
        size: Bytes.
        spans: In their order.
    """

    path: Path
    name: str
    size: int
    spans: tuple[Span, ...]

    def gaps(self) -> list[tuple[int, int]]:
        """Return (begin, stop) of what is before each span, and of what is behind the last one."""
        begins = [0, *(span.stop for span in self.spans)]
        return list(zip(begins, [*(span.begin for span in self.spans), self.size], strict=True))


def sources_of(onnx: Path) -> list[Source]:
    """Return the files of a model, its own first, then external data by name.

    Raises:
        ArtifactError: If the model is missing, cut off or malformed, or its data are missing or outside its folder.
    """
    paths = {onnx.name: onnx}
    found: dict[str, list[Span]] = {onnx.name: []}
    for tensor in _tensors(load_graph(onnx)):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        name, told = onnx.name, _text(tensor.name)
        location = external_location(tensor)
        if location is not None:
            path = beside(onnx.parent, location, told)
            name = str(PurePosixPath(location))
            paths.setdefault(name, path)
        found.setdefault(name, []).extend(_span(tensor, paths[name], told))
    try:
        require_file_names(list(paths))
    except ValueError as error:
        raise ArtifactError(f"{onnx}: {error}.", "Rename the files of external data.") from None
    order = [onnx.name, *sorted(paths.keys() - {onnx.name})]
    return [_source(paths[name], name, found[name]) for name in order]


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Yield every tensor in a message, wherever it stands; protobuf has bounded how deep."""
    waiting: list[Any] = [message]
    while waiting:
        for field, value in waiting.pop().ListFields():
            if field.message_type is None:
                continue
            inner = [value] if isinstance(value, Message) else value
            if field.message_type is TensorProto.DESCRIPTOR:
                yield from inner
            else:
                waiting.extend(inner)


def _span(tensor: TensorProto, path: Path, name: str) -> list[Span]:
    """Return where a tensor's bytes are; nothing where they are few, or take no fixed number of bytes."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    dtype, shape = dtype_name(tensor), tuple(tensor.dims)
    expected = _expected(dtype, shape)
    begin = _integer(entries.get("offset", "0"), name)
    if "length" not in entries and expected is None:
        return []  # the file is kept as it is
    size = _integer(entries["length"], name) if "length" in entries else expected or 0
    if begin + size > (held := path.stat().st_size):
        problem = f"Tensor '{name}' needs bytes {begin} to {begin + size} of '{path.name}', which has {held}."
        raise ArtifactError(problem, REMEDY)
    if size < BIG:
        return []
    if size != expected or (entries.get("location") == HERE and VARINTS in entries):
        dtype, shape = BYTES, (size,)
    return [Span(begin, size, name, dtype, shape)]


def _expected(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return the bytes of a tensor; None where its type or shape is none that is known here."""
    if dtype not in ONNX_BITS or len(shape) > 64 or min(shape, default=0) < 0:
        return None
    elements = 1
    for length in shape:
        elements *= length
    return -(-elements * ONNX_BITS[dtype] // 8) if max(elements, *shape, 0) <= MAX_SIZE else None


def _source(path: Path, name: str, spans: list[Span]) -> Source:
    """Return a file whose spans do not overlap and leave no long rest between them."""
    size = path.stat().st_size
    kept: list[Span] = []
    stop = 0
    for span in sorted(set(spans), key=lambda span: (span.begin, -span.size, span.name)):
        if span.begin >= stop:
            kept += [*_pieces(stop, span.begin), span]
            stop = span.stop
    return Source(path, name, size, (*kept, *_pieces(stop, size)))


def _pieces(begin: int, stop: int) -> Iterator[Span]:
    """Cut a long rest into spans of no meaning."""
    if stop - begin > LONGEST_REST:
        for at in range(begin, stop, LONGEST_PIECE):
            size = min(LONGEST_PIECE, stop - at)
            yield Span(at, size, "", BYTES, (size,))


def _integer(text: object, name: str) -> int:
    if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 15):
        raise ArtifactError(f"Tensor '{name}' has external data at {text!r:.40}, which is no number.", REMEDY)
    return int(text)


def _text(name: str | bytes) -> str:
    """Return a name as text: where it is no UTF-8, protobuf hands out bytes."""
    return (name.decode("utf-8", "replace") if isinstance(name, bytes) else name)[:_NAME]
