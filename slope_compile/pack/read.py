"""Reads a packed file that anybody may have written: tensor by tensor, each proved before it is handed out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy.typing as npt

from slope_compile.compression.codes import CodedTensor
from slope_compile.pack.container import Container
from slope_compile.pack.entries import read_coded, read_tensor
from slope_compile.pack.header import CodedEntry, TensorEntry, elements_of
from slope_compile.pack.restore import prove_files, restore_files, restore_model
from slope_compile.pack.sizes import Sizes, sizes_of
from slope_compile.recipe import parse_pattern

E = TypeVar("E", bound=CodedEntry | TensorEntry)
V = TypeVar("V")


class _Named(Mapping[str, V], Generic[E, V]):
    """Tensors by name, ascending; that one is there is told without reading it."""

    def __init__(self, container: Container, entries: Iterable[E]) -> None:
        self._container = container
        self._entries: dict[str, E] = {entry.name: entry for entry in entries}

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; nothing else is read."""
        return self._entries[name].shape


class PackedCodes(_Named[CodedEntry, CodedTensor]):
    """Coded tensors of a packed file, each read, and checked against the laws, when it is asked for."""

    def __init__(self, container: Container) -> None:
        super().__init__(container, container.header.coded)

    def __getitem__(self, name: str) -> CodedTensor:
        """Return a tensor as numpy arrays.

        Raises:
            ArtifactError: If the file is damaged, or the tensor breaks a law.
        """
        return read_coded(self._container, self._entries[name])

    def bits(self, name: str) -> int:
        """Return the bits that the file declares; nothing else is read."""
        return self._entries[name].bits

    def pattern(self, name: str) -> tuple[int, int] | None:
        """Return the pattern that the file declares; nothing else is read."""
        pattern = self._entries[name].pattern
        return None if pattern is None else parse_pattern(pattern)

    def size(self, name: str) -> int:
        """Return how many codes a tensor has; nothing else is read."""
        return elements_of(self._entries[name].shape)


class PackedTensors(_Named[TensorEntry, npt.NDArray[Any]]):
    """The other tensors of a packed model, each read when it is asked for."""

    def __init__(self, container: Container) -> None:
        super().__init__(container, container.header.tensors if container.header.content == "model" else ())

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor.

        Raises:
            ArtifactError: If the file is damaged.
        """
        return read_tensor(self._container, self._entries[name])

    def dtype(self, name: str) -> str:
        """Return safetensors' name of a tensor's element type; nothing else is read."""
        return self._entries[name].dtype


class Packed:
    """A packed file; nothing of a tensor is read before it is asked for.

    Args:
        path: The file.

    Attributes:
        path: The file.
        kind: `model` or `onnx`: what is packed.
        codes: Of a model: its coded tensors by name. Empty for ONNX, whose scales only its graph knows.
        tensors: Of a model: its other tensors by state dict name; BF16 as ml_dtypes.bfloat16. Empty for ONNX.
        files: Of ONNX: names of the files that `restore` writes, the model's first. Empty for a model.

    Raises:
        ArtifactError: If it is missing, no packed file, damaged, or of a later format.
    """

    def __init__(self, path: Path) -> None:
        self._container = Container(path)
        header = self._container.header
        self.path = path
        self.kind: Literal["model", "onnx"] = header.content
        self.codes = PackedCodes(self._container)
        self.tensors = PackedTensors(self._container)
        self.files = tuple(file.name for file in header.files)

    def __repr__(self) -> str:
        what = f"files={len(self.files)}" if self.files else f"codes={len(self.codes)}, tensors={len(self.tensors)}"
        return f"Packed({str(self.path)!r}, {self.kind}, {what}, {self._container.size} bytes)"

    @cached_property
    def sizes(self) -> Sizes:
        """What the file's bytes go to."""
        return sizes_of(self._container.header, self._container.size)

    def check(self) -> None:
        """Read everything, one tensor at a time: digests, laws; of ONNX the sha256 of each file as it is restored.

        Raises:
            ArtifactError: If a byte is not what was written, or a coded tensor breaks a law.
        """
        for name in self.codes:
            self.codes[name]
        for name in self.tensors:
            self.tensors[name]
        prove_files(self._container)

    def restore(self, folder: Path) -> list[Path]:
        """Write what is packed into a folder, each file proved and then moved into place.

        A model gives codes.safetensors, byte for byte that of its run, and tensors.safetensors; ONNX its file, first,
        and its external data.

        Args:
            folder: Made where it is missing.

        Raises:
            ArtifactError: If the packed file is damaged, or one of the files exists already.
            StorageError: If the file system refuses; no part of a file is left.
        """
        return (restore_model if self.kind == "model" else restore_files)(self._container, folder)


def open_packed(path: Path) -> Packed:
    """Open a packed file: its header is proved and read, nothing else.

    Raises:
        ArtifactError: If it is missing, no packed file, damaged, or of a later format.
    """
    return Packed(path)
