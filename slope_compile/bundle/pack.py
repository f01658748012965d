"""Writing a bundle: the same files give the same bytes, and what was written is read back before it counts."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from slope_compile.artifacts import CHUNK, storage_errors, sync
from slope_compile.bundle.archive import prove
from slope_compile.bundle.contents import INDEX, Contents

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can tell
MODE = 0o100644 << 16  # a plain file, rw-r--r--


def write_bundle(path: Path, contents: Contents, files: Mapping[str, Path]) -> None:
    """Write an archive, prove it by reading it back, and move it into place.

    Args:
        path: The archive.
        contents: What bundle.json says; lists size and sha256 of every file.
        files: Name -> where it lies.

    Raises:
        ArtifactError: If a file is no longer what `contents` lists, or exceeds what a bundle may hold.
        StorageError: If the archive cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: another command may be writing the same archive.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
            temporary = Path(work) / path.name
            with zipfile.ZipFile(temporary, "w") as archive:
                archive.writestr(_entry(INDEX), contents.to_json())
                for name in sorted(files):
                    _add(archive, name, files[name])
            prove(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)


def _add(archive: zipfile.ZipFile, name: str, path: Path) -> None:
    entry = _entry(name)
    entry.file_size = path.stat().st_size  # decides whether the entry is a 64-bit one
    with path.open("rb") as source, archive.open(entry, "w") as sink:
        while piece := source.read(CHUNK):
            sink.write(piece)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.external_attr = MODE
    entry.create_system = 3  # Unix, wherever it is written
    return entry
