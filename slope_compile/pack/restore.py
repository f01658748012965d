"""What is packed as files again: in a hidden folder first, and moved into place when all are proved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slope_compile.artifacts import storage_errors, sync
from slope_compile.codes_file import HEADER_KEY
from slope_compile.errors import ArtifactError, StorageError
from slope_compile.pack.container import REMEDY, Container
from slope_compile.pack.digits import Bytes
from slope_compile.pack.entries import as_bytes, read_coded, read_payload, read_tensor
from slope_compile.pack.header import CodedEntry, FileEntry, TensorEntry
from slope_compile.pack.numbers import decode_numbers
from slope_compile.pack.safetensors_file import RESERVED, Part, write_safetensors

CODES, TENSORS = "codes.safetensors", "tensors.safetensors"


def restore_model(container: Container, folder: Path) -> list[Path]:
    """Write codes.safetensors and tensors.safetensors; as `Packed.restore`."""
    header = container.header
    codes: dict[str, Part] = {}
    for coded in header.coded:
        codes[f"{coded.name}.codes"] = Part("I8", coded.shape, _codes(container, coded))
        codes[f"{coded.name}.scale"] = Part("F32", (coded.shape[coded.axis],), _scale(container, coded))
    if len(codes) != 2 * len(header.coded) or any(entry.name == RESERVED for entry in header.tensors):
        raise ArtifactError(f"{container.path} holds names that no safetensors file can have.", REMEDY)
    rows = {entry.name: {"bits": entry.bits, "axis": entry.axis, "pattern": entry.pattern} for entry in header.coded}
    tensors = {entry.name: Part(entry.dtype, entry.shape, _numbers(container, entry)) for entry in header.tensors}

    def fill(work: Path) -> None:
        write_safetensors(work / CODES, codes, {HEADER_KEY: json.dumps(rows, sort_keys=True)})
        write_safetensors(work / TENSORS, tensors, {})

    size = sum(part.size for part in (*codes.values(), *tensors.values()))
    return _restored(container, folder, [CODES, TENSORS], size, fill)


def restore_files(container: Container, folder: Path) -> list[Path]:
    """Write the files of a packed ONNX; as `Packed.restore`."""
    files = container.header.files

    def fill(work: Path) -> None:
        for file, pieces in _files(container):
            path = work / file.name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as out:
                _prove(container, file, pieces, out.write)

    return _restored(container, folder, [file.name for file in files], sum(file.size for file in files), fill)


def prove_files(container: Container) -> None:
    """Raise unless every file of a packed ONNX would be restored as it was; nothing is written.

    Raises:
        ArtifactError: If one would not.
    """
    for file, pieces in _files(container):
        _prove(container, file, pieces, len)


def _files(container: Container) -> Iterator[tuple[FileEntry, Iterator[Bytes]]]:
    """Yield each file and its bytes, in pieces."""
    tensors = iter(container.header.tensors)
    for file in container.header.files:
        yield file, _pieces(container, file, [tensor for _, tensor in zip(file.gaps, tensors, strict=False)])


def _pieces(container: Container, file: FileEntry, tensors: list[TensorEntry]) -> Iterator[Bytes]:
    rest = decode_numbers(container.read(file.section, file.rest.streams))
    at = 0
    for gap, tensor in zip(file.gaps, tensors, strict=True):
        yield rest[at : at + gap]
        yield read_payload(container, tensor)
        at += gap
    yield rest[at:]


def _prove(container: Container, file: FileEntry, pieces: Iterator[Bytes], sink: Callable[[Any], object]) -> None:
    digest = hashlib.sha256()
    for piece in pieces:
        data = memoryview(piece)  # type: ignore[arg-type]
        digest.update(data)
        sink(data)
    if digest.hexdigest() != file.sha256:
        said = f"{digest.hexdigest()[:12]}…, not {file.sha256[:12]}…"
        raise ArtifactError(f"{container.path}: '{file.name}' would be restored with sha256 {said}.", REMEDY)


def _restored(
    container: Container, folder: Path, names: list[str], size: int, fill: Callable[[Path], None]
) -> list[Path]:
    """Fill a hidden folder and move its files into place."""
    with storage_errors(folder):
        if os.path.lexists(folder) and not folder.is_dir():
            what = "exists and is no folder" if folder.exists() else "is a link that leads nowhere"
            raise StorageError(f"{folder} {what}.", "Name another folder, or remove it first.")
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            root = folder.resolve()
            targets = [root / name for name in names]
            for target in targets:
                _require_free(root, target)
            if size > (free := shutil.disk_usage(folder).free):
                need = f"{container.path} unpacks to {size / 2**20:.0f} MiB"
                raise StorageError(f"{need}, and {folder} has {free / 2**20:.0f} MiB free.", "Free some space.")
            with tempfile.TemporaryDirectory(prefix=".unpack.", dir=folder) as name:
                work = Path(name)
                fill(work)
                for target in targets:
                    source = work / target.relative_to(root)
                    sync(source)
                    _require_free(root, target)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source.rename(target)
            sync(folder)
        except BaseException:
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
        return [folder / name for name in names]


def _require_free(root: Path, target: Path) -> None:
    """Raise if a file is there already, or would be written through a link, however far above it."""
    for parent in reversed(target.relative_to(root).parents):
        folder = root / parent  # first the root itself, which is resolved
        if folder.is_symlink():
            raise ArtifactError(f"{folder} is a link; nothing is written through it.", "Name another folder.")
        if folder.exists() and not folder.is_dir():
            raise ArtifactError(f"{folder} exists and is no folder.", "Name another folder, or remove it first.")
    if os.path.lexists(target):
        raise ArtifactError(f"{target} exists already.", "Name another folder, or remove it first.")


def _codes(container: Container, entry: CodedEntry) -> Callable[[], Bytes]:
    return lambda: as_bytes(read_coded(container, entry).codes)


def _scale(container: Container, entry: CodedEntry) -> Callable[[], Bytes]:
    return lambda: as_bytes(read_coded(container, entry).scale)


def _numbers(container: Container, entry: TensorEntry) -> Callable[[], Bytes]:
    return lambda: as_bytes(read_tensor(container, entry))
