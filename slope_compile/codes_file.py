"""codes.safetensors: the coded tensors of a trained model, readable with plain safetensors and numpy.

Layout: `NAME.codes` int8 [shape], `NAME.scale` float32 [channels], and one header entry `coded_tensors`, a JSON object
NAME -> {"bits", "axis", "pattern"}. One entry only: safetensors keeps header entries in no fixed order, and the file's
bytes must depend on its contents alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError
from slope_compile.recipe import parse_pattern
from slope_compile.tensor_file import TensorFile

HEADER_KEY = "coded_tensors"


def codes_digest(codes: npt.NDArray[Any]) -> str:
    """Return what tells one tensor's codes from another's: of sha256 over shape and int8 codes, 16 hex digits."""
    digest = hashlib.sha256(json.dumps(list(codes.shape)).encode())
    digest.update(np.ascontiguousarray(codes, np.int8).data)
    return digest.hexdigest()[:16]


def scale_digest(scale: npt.NDArray[Any]) -> str:
    """Return what tells one tensor's scales from another's: of sha256 over their float32 bits, 16 hex digits."""
    return hashlib.sha256(np.ascontiguousarray(scale, "<f4").data).hexdigest()[:16]


def save_codes(path: Path, codes: Mapping[str, CodedTensor]) -> None:
    """Write coded tensors, checked against the laws first.

    Raises:
        ArtifactError: If a tensor breaks its range, pattern or scale law.
    """
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    header: dict[str, dict[str, Any]] = {}
    for name in sorted(codes):
        coded = codes[name]
        coded.check(name)
        tensors[f"{name}.codes"] = np.ascontiguousarray(np.asarray(coded.codes, dtype=np.int8))
        tensors[f"{name}.scale"] = np.ascontiguousarray(np.asarray(coded.scale, dtype=np.float32))
        pattern = None if coded.pattern is None else f"{coded.pattern[0]}:{coded.pattern[1]}"
        header[name] = {"bits": coded.bits, "axis": coded.axis, "pattern": pattern}
    save_file(tensors, path, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})


class StoredCodes(Mapping[str, CodedTensor]):
    """Coded tensors in a file, each read, and checked against the laws, when it is asked for.

    Args:
        path: The file.

    Raises:
        ArtifactError: If the file is missing, truncated or not ours. Asking for a tensor raises it too, where the
            tensor breaks a law.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._sound = set[str]()  # checked before
        with _readable(path):
            self._file = TensorFile(path)
            rows = json.loads(self._file.metadata[HEADER_KEY])
            self._rows = {str(name): _Row.of(row) for name, row in rows.items()}
            if missing := [name for name in self._rows if f"{name}.codes" not in self._file.entries]:
                raise ValueError(f"it has no codes of {', '.join(missing[:3])}")

    def __getitem__(self, name: str) -> CodedTensor:
        """Return a tensor as numpy arrays."""
        row = self._rows[name]
        with _readable(self._path):
            codes, scale = self._file.read(f"{name}.codes"), self._file.read(f"{name}.scale")
            if codes.dtype != np.int8 or scale.dtype != np.float32:
                raise ValueError(f"{name} holds {codes.dtype} codes and {scale.dtype} scales, not int8 and float32")
            coded = CodedTensor(codes=codes, scale=scale, bits=row.bits, axis=row.axis, pattern=row.pattern)
            if name not in self._sound:
                coded.check(name)
                self._sound.add(name)
        return coded

    def __contains__(self, name: object) -> bool:
        """Return whether there is such a tensor; it is not read for that."""
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._rows)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._rows)

    def bits(self, name: str) -> int:
        """Return the bits that the file declares; nothing else is read."""
        return self._rows[name].bits

    def pattern(self, name: str) -> tuple[int, int] | None:
        """Return the pattern that the file declares; nothing else is read."""
        return self._rows[name].pattern

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor's codes; nothing else is read."""
        return self._file.entries[f"{name}.codes"].shape

    def size(self, name: str) -> int:
        """Return how many codes a tensor has; nothing else is read."""
        return self._file.entries[f"{name}.codes"].elements

    @property
    def strangers(self) -> list[str]:
        """Names of tensors in the file that belong to no coded tensor."""
        ours = {f"{name}.{part}" for name in self._rows for part in ("codes", "scale")}
        return sorted(self._file.entries.keys() - ours)


def load_codes(path: Path) -> dict[str, CodedTensor]:
    """Read coded tensors as numpy arrays, checked against the laws.

    Raises:
        ArtifactError: If the file is missing, truncated, not ours, or a tensor breaks a law.
    """
    return dict(StoredCodes(path))


class _Row(NamedTuple):
    """What the header says of a tensor."""

    bits: int
    axis: int
    pattern: tuple[int, int] | None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Row:
        pattern = None if row["pattern"] is None else parse_pattern(row["pattern"])
        return cls(int(row["bits"]), int(row["axis"]), pattern)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn whatever a file that is none of ours raises into an ArtifactError that says so."""
    remedy = "Make it anew with `slope-compile train`, or take the file from where it was made."
    try:
        yield
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist.", remedy) from None
    except (
        SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError, RecursionError
    ) as error:  # fmt: skip
        raise ArtifactError(f"{path} is not a file of coded tensors: {error}.", remedy) from None
