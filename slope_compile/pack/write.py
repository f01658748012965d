"""Packs a trained run, a torch model or an ONNX file: written beside, read back and compared, then moved into place."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from pydantic import ValidationError

from slope_compile.artifacts import FileDigest, storage_errors, sync
from slope_compile.codes_file import StoredCodes
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError, CheckFailedError, StorageError
from slope_compile.pack.audit import audit
from slope_compile.pack.container import Sections, write_container
from slope_compile.pack.entries import add_coded, add_payload, add_tensor, as_bytes
from slope_compile.pack.header import FileEntry, Header, TensorEntry
from slope_compile.pack.kept import KeptTensors, kept_of_checkpoint
from slope_compile.pack.numbers import encode_numbers
from slope_compile.pack.read import Packed
from slope_compile.pack.spans import Source, sources_of
from slope_compile.pack.streams import TEXT_LEVEL

if TYPE_CHECKING:
    from torch import nn

CODES, CHECKPOINT = "codes.safetensors", "checkpoint.safetensors"  # of the train stage
_UNREADABLE = "No reader would take the file."
_Fill = Callable[[Sections], dict[str, Any]]  # writes sections, returns what the header says of them
_Prove = Callable[[Packed], None]


def pack_run(train: Path, out: Path) -> Packed:
    """Pack what a run trained: its coded tensors, and every other tensor of the checkpoint but latents and their steps.

    Args:
        train: The train stage's folder.
        out: The file to write; what is there is replaced when the new file is proved.

    Raises:
        ArtifactError: If the checkpoint or its codes are damaged, or do not belong together.
        CheckFailedError: If the written bytes do not hold what was trained.
        StorageError: If the disk is full or read-only; no part of a file is left.
    """
    codes = StoredCodes(train / CODES)
    return _packed_model(codes, kept_of_checkpoint(train / CHECKPOINT, codes), out)


def pack_model(model: nn.Module, out: Path) -> Packed:
    """Pack a compressed torch model; it is left as it is. As `pack_run`.

    Raises:
        ModelError: If the model is not compressed, or holds what is no tensor on a device.
    """
    from slope_compile.pack.torch_model import coded_and_kept

    return _packed_model(*coded_and_kept(model), out)


def pack_onnx(onnx: Path, out: Path) -> Packed:
    """Pack an ONNX file and its external data, so that `restore` gives them back bit for bit.

    Raises:
        ArtifactError: If the file is missing, cut off or malformed, or points outside its folder.
        CheckFailedError: If the written bytes do not give the files back.
        StorageError: As `pack_run`.
    """
    sources = sources_of(onnx)
    if any(out.exists() and out.samefile(source.path) for source in sources):
        raise StorageError(f"{out} is a file that is to be packed.", "Name another file with --out.")

    def fill(sections: Sections) -> dict[str, Any]:
        tensors = tuple(entry for source in sources for entry in _payloads(source, sections))
        files = tuple(_file(source, sections) for source in sources)
        return {"content": "onnx", "coded": (), "tensors": tensors, "files": files}

    return _packed(out, fill, Packed.check)


def _packed_model(codes: Mapping[str, CodedTensor], kept: KeptTensors, out: Path) -> Packed:
    def fill(sections: Sections) -> dict[str, Any]:
        coded = tuple(add_coded(sections, name, _lawful(name, codes[name])) for name in sorted(codes))
        tensors = tuple(add_tensor(sections, name, kept.dtype(name), kept[name]) for name in kept)
        return {"content": "model", "coded": coded, "tensors": tensors, "files": ()}

    def prove(packed: Packed) -> None:
        for name, coded in codes.items():
            found = packed.codes[name]
            equal = np.array_equal(np.asarray(coded.codes), found.codes)
            if not (equal and as_bytes(np.asarray(coded.scale)).tobytes() == as_bytes(found.scale).tobytes()):
                raise CheckFailedError(f"The packed file does not hold the codes of {name} that were packed.")
            if (coded.bits, coded.axis, coded.pattern) != (found.bits, found.axis, found.pattern):
                raise CheckFailedError(f"The packed file says other bits, axis or pattern of {name}.")
        for name in kept:
            if not np.array_equal(as_bytes(kept[name]), as_bytes(packed.tensors[name])):
                raise CheckFailedError(f"The packed file does not hold {name} as it was packed.")

    return _packed(out, fill, prove)


def _lawful(name: str, coded: CodedTensor) -> CodedTensor:
    coded.check(name)
    return coded


def _packed(out: Path, fill: _Fill, prove: _Prove) -> Packed:
    """Write a packed file beside `out`, prove it, and move it into place."""
    if out.exists() and not out.is_file():
        raise StorageError(f"{out} exists and is no file.", "Name another file with --out.")
    with storage_errors(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        work = Path(name)
        with (work / "sections").open("w+b") as file, (work / "packed").open("wb") as packed:
            sections = Sections(file)
            header = _header(fill, sections, file)
            file.seek(0)
            write_container(header, file, packed)
            packed.flush()
            os.fsync(packed.fileno())
        try:
            prove(Packed(work / "packed"))
        except ArtifactError as error:
            raise CheckFailedError(f"{out} would not give back what was packed: {error.problem}") from None
        (work / "packed").replace(out)
        sync(out.parent)
    return Packed(out)


def _header(fill: _Fill, sections: Sections, file: BinaryIO) -> Header:
    """Write the sections and return what is said of them, as a reader would believe it."""
    try:
        said = fill(sections)
        header = Header(sections=sections.table, **said)
    except ValidationError as error:  # a name of kilobytes
        raise ArtifactError(f"This cannot be packed: {error.errors()[0]['msg']}.", _UNREADABLE) from None
    try:
        audit(header, file.tell(), file.tell())
    except ValueError as error:  # gigabytes of nothing but zeros
        raise ArtifactError(f"This cannot be packed: {error}.", _UNREADABLE) from None
    return header


def _payloads(source: Source, sections: Sections) -> Iterator[TensorEntry]:
    with source.path.open("rb") as file:
        for span in source.spans:
            raw = _read(file, source, span.begin, span.stop)
            yield add_payload(sections, span.name, span.dtype, span.shape, raw)


def _file(source: Source, sections: Sections) -> FileEntry:
    with source.path.open("rb") as file:
        rest = b"".join(_read(file, source, begin, stop).tobytes() for begin, stop in source.gaps())
    numbers, runs = encode_numbers(np.frombuffer(rest, np.uint8), 1, TEXT_LEVEL)
    digest = FileDigest.of(source.path)
    return FileEntry(
        name=source.name,
        size=source.size,
        sha256=digest.sha256,
        section=sections.add(runs),
        gaps=tuple(stop - begin for begin, stop in source.gaps()[:-1]),
        rest=numbers,
    )


def _read(file: BinaryIO, source: Source, begin: int, stop: int) -> Any:
    file.seek(begin)
    data = np.fromfile(file, np.uint8, stop - begin)
    if data.size != stop - begin:
        raise ArtifactError(f"{source.path} was cut off while it was packed.", "Pack it again.")
    return data
