"""Reading a bundle that anybody may have written: what a file says about itself is not believed before it is counted.

A zip, but no more of one than `pack.py` writes: plain files of known names, stored or deflated, none twice, no comment,
sizes as in bundle.json. Each file's bytes are counted and digested while they are inflated.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from slope_compile.artifacts import CHUNK, storage_errors
from slope_compile.bundle.contents import INDEX, MAX_INDEX_BYTES, NAMES, REMEDY, Contents, Entry, read_contents
from slope_compile.errors import ArtifactError, StorageError

MAX_TOTAL_BYTES = 2**35
MAX_DIRECTORY_BYTES = 2**16  # that of our names takes 1 KiB
# A zip bomb inflates to a thousand times its size. Codes deflate to a fourth, images of one colour to a hundredth.
MAX_INFLATION, MIN_ALLOWANCE = 200, 2**26
# End of central directory, its 64-bit form and the locator of that; zipfile reads these, and all that they ask it to
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ORDINARY_FLAGS = 0x0808  # a size behind the data, a name in UTF-8; anything else is encrypted or patched
_BROKEN = (  # what zipfile and zlib answer to damaged bytes
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, ValueError, KeyError,
    OverflowError, IndexError, OSError,
)  # fmt: skip


class Archive:
    """An open bundle whose directory and bundle.json are in order.

    Args:
        path: The file.
        opened: The zip.
        members: Its entries by name.

    Raises:
        ArtifactError: If bundle.json is damaged, of a later format, or lists other files than there are.
    """

    def __init__(self, path: Path, opened: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
        self._path, self._zip, self._members = path, opened, members
        pieces: list[bytes] = []
        self._read(members[INDEX], MAX_INDEX_BYTES, pieces.append)
        self.contents: Contents = read_contents(b"".join(pieces), path.name)
        _require_listed(path, members, self.contents)

    def copy(self, name: str, sink: Callable[[bytes], object]) -> None:
        """Hand a file's bytes to `sink`, piece by piece.

        Raises:
            ArtifactError: If they are not those that bundle.json lists; `sink` has had some by then.
        """
        entry = self.contents.files[name]
        digest = hashlib.sha256()

        def take(piece: bytes) -> None:
            digest.update(piece)
            sink(piece)

        size = self._read(self._members[name], entry.size, take)
        if Entry(size=size, sha256=digest.hexdigest()) != entry:
            found = f"{size} bytes with sha256 {digest.hexdigest()[:12]}…"
            said = f"{entry.size} with {entry.sha256[:12]}…"
            raise ArtifactError(f"{self._path.name}: {name} has {found}, {INDEX} says {said}.", REMEDY)

    def _read(self, member: zipfile.ZipInfo, most: int, sink: Callable[[bytes], object]) -> int:
        """Inflate a member and return its size.

        Raises:
            ArtifactError: If it is damaged, or gives more bytes than `most`.
        """
        size = 0
        for piece in self._pieces(member):
            size += len(piece)
            if size > most:
                raise ArtifactError(f"{self._path.name}: {member.filename} has more than {most} bytes.", REMEDY)
            sink(piece)
        return size

    def _pieces(self, member: zipfile.ZipInfo) -> Iterator[bytes]:
        with _damage(self._path, member.filename), self._zip.open(member) as file:
            while piece := file.read(CHUNK):
                yield piece


@contextmanager
def opened_bundle(path: Path) -> Iterator[Archive]:
    """Open a bundle and read its bundle.json; nothing else is inflated.

    Raises:
        ArtifactError: If it is missing, no bundle, damaged, or of a later format.
    """
    if not path.is_file():
        state = "is not a file" if path.exists() else "does not exist"
        raise ArtifactError(f"{path} {state}.", "Name the archive that `slope-compile bundle` wrote.")
    with path.open("rb") as file:
        _require_small_directory(path, file)
        with _damage(path, "its directory"):
            opened = zipfile.ZipFile(file)
        with opened:
            yield Archive(path, opened, _members(path, opened))


def unpack(path: Path, folder: Path) -> Contents:
    """Write a bundle's files into an empty folder, each proved as it is written.

    Args:
        path: The archive.
        folder: Where to; whoever made it removes it if this raises.

    Raises:
        ArtifactError: If the archive is not in order, or a file not what bundle.json lists.
        StorageError: If the file system refuses, or has too little room.
    """
    with opened_bundle(path) as archive, storage_errors(folder):
        contents = archive.contents
        total, free = sum(entry.size for entry in contents.files.values()), shutil.disk_usage(folder).free
        if total > free:
            raise StorageError(
                f"{path.name} unpacks to {total / 2**20:.0f} MiB, and {folder.parent} has {free / 2**20:.0f} MiB free.",
                "Free some space, or name a folder elsewhere with --out.",
            )
        for name in sorted(contents.files):
            with (folder / name).open("xb") as file:
                archive.copy(name, file.write)
        (folder / INDEX).write_text(contents.to_json(), encoding="utf-8")
        return contents


def prove(path: Path) -> Contents:
    """Read a whole bundle and compare every file with bundle.json; nothing is written.

    Raises:
        ArtifactError: As `unpack`.
    """
    with opened_bundle(path) as archive:
        for name in archive.contents.files:
            archive.copy(name, len)
        return archive.contents


def _require_small_directory(path: Path, file: BinaryIO) -> None:
    """Raise if zipfile would read a long directory into memory: it believes what the end of the file says."""
    file.seek(0, 2)
    size = file.tell()
    tail_size = min(size, _END.size + _LOCATOR.size + _END64.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    file.seek(0)
    if len(tail) < _END.size or not tail[-_END.size :].startswith(b"PK\5\6"):
        raise ArtifactError(f"{path.name} is not a bundle: it is no zip file, or is cut off.", REMEDY)
    _, _, _, _, count, length, _, _ = _END.unpack(tail[-_END.size :])
    sizes = [(count, length)]
    if tail[: _END64.size].startswith(b"PK\6\6") and len(tail) == _END.size + _LOCATOR.size + _END64.size:
        *_, count64, length64, _ = _END64.unpack(tail[: _END64.size])
        sizes.append((count64, length64))
    if any(count > len(NAMES) + 1 or length > MAX_DIRECTORY_BYTES for count, length in sizes):
        raise ArtifactError(f"{path.name} is not a bundle: it holds more files than any has.", REMEDY)


def _members(path: Path, opened: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name.

    Raises:
        ArtifactError: If a name is none of ours or there twice, or an entry is no plain file.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    for member in opened.infolist():
        name = member.orig_filename
        shown = "".join(c if c.isprintable() else "?" for c in name)[:100]
        if name not in NAMES | {INDEX} or name != member.filename:
            raise ArtifactError(f"{path.name} holds '{shown}', which no bundle does.", REMEDY)
        if name in members:
            raise ArtifactError(f"{path.name} holds '{name}' twice.", REMEDY)
        mode = member.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            raise ArtifactError(f"{path.name}: '{name}' is a link or a device, not a file.", REMEDY)
        if member.compress_type not in _METHODS or member.flag_bits & ~_ORDINARY_FLAGS:
            raise ArtifactError(f"{path.name}: '{name}' is packed in a way that no bundle is.", REMEDY)
        members[name] = member
    if INDEX not in members:
        raise ArtifactError(f"{path.name} is not a bundle: it has no {INDEX}.", REMEDY)
    return members


def _require_listed(path: Path, members: Mapping[str, zipfile.ZipInfo], contents: Contents) -> None:
    """Raise unless archive and bundle.json name the same files, with the same sizes, within reason."""
    if different := sorted((members.keys() - {INDEX}) ^ contents.files.keys()):
        where = "the archive" if different[0] in members else INDEX
        raise ArtifactError(f"{path.name}: '{different[0]}' is in {where} only.", REMEDY)
    for name, entry in contents.files.items():
        if members[name].file_size != entry.size:
            found = f"{members[name].file_size} bytes"
            raise ArtifactError(f"{path.name}: '{name}' has {found}, {INDEX} says {entry.size}.", REMEDY)
    total, size = sum(entry.size for entry in contents.files.values()), path.stat().st_size
    if total > min(MAX_TOTAL_BYTES, MIN_ALLOWANCE + MAX_INFLATION * size):
        raise ArtifactError(f"{path.name} has {size} bytes and would unpack to {total}: no bundle does.", REMEDY)


@contextmanager
def _damage(path: Path, what: str) -> Iterator[None]:
    """Turn whatever reading a damaged zip raises into an error that names the file."""
    try:
        yield
    except _BROKEN as error:
        told = "".join(c if c.isprintable() else "?" for c in str(error))[:200] or type(error).__name__
        raise ArtifactError(f"{path.name} is damaged: {what}: {told}.", REMEDY) from None
