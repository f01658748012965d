"""The packed file as bytes: a fixed beginning, the header, then the sections one after the other.

| offset | bytes | what |
|---|---|---|
| 0 | 8 | magic: 89 53 4C 4F 50 45 0D 0A |
| 8 | 4 | format version, 1 (all integers unsigned, little-endian) |
| 12 | 4 | h: bytes of the header as it is stored |
| 16 | 4 | bytes of the header, unpacked |
| 20 | 32 | sha256 of bytes 0 to 19 and of the stored header |
| 52 | h | the header: JSON, as one zstd frame where that is shorter |
| 52 + h | | the sections, without gaps, to the end of the file |
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from slope_compile.errors import ArtifactError, LaterFormatError
from slope_compile.pack.audit import audit
from slope_compile.pack.digits import Bytes
from slope_compile.pack.header import MAX_BYTES, Header, Section
from slope_compile.pack.streams import TEXT_LEVEL, Stored, stored, unpacked

MAGIC = b"\x89SLOPE\r\n"
VERSION = 1
MADE_BY_PACK = "Name a file that `slope-compile pack` wrote."
REMEDY = "Copy the file again, or pack anew with `slope-compile pack`."
_FIXED = struct.Struct("<8s3L")
_BEGIN = _FIXED.size + hashlib.sha256().digest_size
_CHUNK = 1 << 20
_NAMED = 6  # bytes of the magic that say whose file it is; the others show what copying it as text does


class Sections:
    """Sections on their way into a file; equal ones are written once.

    Args:
        file: Where they go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._index: dict[Section, int] = {}

    @property
    def table(self) -> tuple[Section, ...]:
        """What has been written."""
        return tuple(self._index)

    def add(self, runs: Iterable[Stored]) -> int:
        """Write runs as one section; return its index, an earlier one's where that has the same bytes."""
        data = [run.data for run in runs]
        digest = hashlib.sha256()
        for part in data:
            digest.update(part)
        section = Section(stored=sum(map(len, data)), sha256=digest.hexdigest())
        if section not in self._index:
            self._index[section] = len(self._index)
            for part in data:
                self._file.write(part)
        return self._index[section]


class Container:
    """An open packed file whose header is in order.

    Args:
        path: The file.

    Attributes:
        path: The file.
        header: What it holds.
        size: Its bytes.

    Raises:
        ArtifactError: If it is missing, no packed file, or damaged.
        LaterFormatError: If it is of a later format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            state = "is not a file" if path.exists() else "does not exist"
            raise ArtifactError(f"{path} {state}.", MADE_BY_PACK)
        with damage(path), path.open("rb") as file:
            self.size = file.seek(0, 2)
            self.header, behind = _read_header(path, file, self.size)
            audit(self.header, self.size - behind, self.size)
        self._offsets = [behind]
        for section in self.header.sections:
            self._offsets.append(self._offsets[-1] + section.stored)

    def read(self, index: int, streams: Sequence[tuple[int, int]]) -> list[Bytes]:
        """Return the runs of a section, unpacked, uint8; its digest is proved first.

        Raises:
            ArtifactError: If the bytes are not those that were written.
        """
        section = self.header.sections[index]
        with damage(self.path), self.path.open("rb") as file:
            file.seek(self._offsets[index])
            data = memoryview(file.read(section.stored))
            if hashlib.sha256(data).hexdigest() != section.sha256:
                raise ValueError(f"section {index} is not what was written: its sha256 differs")
            runs, at = [], 0
            for length, raw in streams:
                runs.append(unpacked(data[at : at + length], raw))
                at += length
            return runs


@contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turn whatever reading a damaged file raises into an error that names the file."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"])
        raise ArtifactError(f"{path} is damaged: its header: {place}: {first['msg'][:200]}.", REMEDY) from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from None
    except (ValueError, OverflowError, MemoryError) as error:
        told = "".join(c if c.isprintable() else "?" for c in str(error))[:300] or type(error).__name__
        raise ArtifactError(f"{path} is damaged: {told}.", REMEDY) from None


def begins_packed(path: Path) -> bool:
    """Whether a file begins as a packed file does."""
    try:
        return path.is_file() and _first(path) == MAGIC
    except OSError:
        return False


def _first(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


def write_container(header: Header, sections: BinaryIO, out: BinaryIO) -> None:
    """Write a file.

    Args:
        header: What it holds.
        sections: Their bytes, from where it stands to its end.
        out: Where to.
    """
    kept = stored(header.to_json(), TEXT_LEVEL)
    begin = _FIXED.pack(MAGIC, VERSION, len(kept.data), kept.raw)
    out.write(begin + hashlib.sha256(begin + kept.data).digest() + kept.data)
    while chunk := sections.read(_CHUNK):
        out.write(chunk)


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[Header, int]:
    """Return the header, and where it ends; what is damaged is a ValueError."""
    file.seek(0)
    begin = file.read(_BEGIN)
    if begin[:_NAMED] != MAGIC[: min(_NAMED, len(begin))]:
        raise ArtifactError(f"{path} is no packed file: it does not begin as one does.", MADE_BY_PACK)
    if begin[: len(MAGIC)] != MAGIC[: len(begin)]:
        raise ValueError("the ends of its lines were changed: it was copied as text")
    if len(begin) < _BEGIN:
        raise ValueError("it is cut off")
    _, version, length, raw = _FIXED.unpack_from(begin)
    if version > VERSION:
        raise LaterFormatError(
            f"{path} is of format {version}, this version reads {VERSION}.",
            "Update slope-compile; if nobody packed it with a later version, the file is damaged: copy it again.",
        )
    if version < VERSION:
        raise ValueError(f"it is of format {version}, which there never was")
    if not 0 < length <= raw <= MAX_BYTES or _BEGIN + length > size:
        raise ValueError(f"its header is said to have {length} bytes, {raw} unpacked, of the file's {size}")
    data = file.read(length)
    if hashlib.sha256(begin[: _FIXED.size] + data).digest() != begin[_FIXED.size :]:
        raise ValueError("its header is not what was written: its sha256 differs")
    return Header.from_json(unpacked(data, raw).tobytes()), _BEGIN + length
