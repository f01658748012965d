"""ONNX files and their tensors as numpy arrays: nothing a file says about itself is believed before it is checked."""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from slope_compile.errors import ArtifactError
from slope_compile.qdq.elements import VARINT_BYTES, Bytes, Varints, read_elements
from slope_compile.qdq.wire import HERE, VARINTS, without_big_tensors

MAX_MODEL_BYTES = 2**31  # protobuf's own limit: bigger models keep their weights in external data
MAX_ELEMENTS = 2**32

REMEDY = "Export the model again; a file that something else wrote must be valid ONNX."
INTEGER_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}
_NAMES = {number: str(name) for name, number in TensorProto.DataType.items()}
_BITS = INTEGER_BITS | {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "INT32": 32, "INT64": 64}


class UnreadTypeError(ArtifactError):
    """A tensor's element type is one that no weight of ours has: the file may be right all the same."""


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, external data left where it is.

    Raises:
        ArtifactError: If the file is missing, too big, or no ONNX model.
    """
    return _parsed(path, path.read_bytes() if _size(path) else b"")


def load_graph(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, external data left where it is, and the numbers of big tensors left in the file too.

    `to_numpy(tensor, path, ...)` reads them. To run the model, or to write it, take `load_model`.

    Raises:
        ArtifactError: As `load_model`.
    """
    size = _size(path)
    with path.open("rb") as file:
        return _parsed(path, without_big_tensors(file, size))


def _size(path: Path) -> int:
    if not path.is_file():
        raise ArtifactError(f"There is no ONNX file {path}.", "Check the path, or export the model first.")
    size = path.stat().st_size
    if size > MAX_MODEL_BYTES:
        raise ArtifactError(f"{path} is {size} bytes; an ONNX file has at most {MAX_MODEL_BYTES}.", REMEDY)
    return size


def _parsed(path: Path, data: bytes) -> onnx.ModelProto:
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except (DecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no ONNX model, or is cut off: {error}.", REMEDY) from None
    if not model.HasField("graph"):
        raise ArtifactError(f"{path} holds no graph: it is no ONNX model, or is cut off.", REMEDY)
    for tensor in _tensors(model):
        location = external_location(tensor)
        if location is not None and "\0" in location:
            raise ArtifactError(f"{path}: tensor '{tensor.name}' says that it lies in '{location}'.", REMEDY)
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model, wherever it stands; protobuf has bounded how deep."""
    graphs = [model.graph]
    attributes = [one for function in model.functions for one in function.attribute_proto]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes or attributes:
        for graph in graphs:
            nodes += graph.node
            yield from graph.initializer
            yield from (part for sparse in graph.sparse_initializer for part in (sparse.values, sparse.indices))
        attributes += [attribute for node in nodes for attribute in node.attribute]
        graphs, nodes = [], []
        for attribute in attributes:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        attributes = []


def dtype_name(tensor: TensorProto) -> str:
    """Return ONNX's name of the element type, such as `INT4`; `UNKNOWN` for a number that is no type."""
    return _NAMES.get(tensor.data_type, "UNKNOWN")


def element_bits(dtype: str) -> int:
    """Return the bits that one stored element of an ONNX type takes."""
    return _BITS[dtype]


def external_location(tensor: TensorProto) -> str | None:
    """Return the other file in which a tensor's numbers are, as the tensor says it; None where there is none."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return None
    # Of several, ONNX and `to_numpy` take the last. Of a value that is no UTF-8 protobuf hands out bytes.
    location = {entry.key: entry.value for entry in tensor.external_data}.get("location", "")
    return None if location == HERE else str(location)


def to_numpy(tensor: TensorProto, place: Path | None, name: str) -> npt.NDArray[Any]:
    """Return the elements: 2-, 4- and 8-bit integers as int8 or uint8, half types as float32, others as they are.

    Nothing else of that size is held, but for the bytes of a tensor that is in memory.

    Args:
        tensor: The tensor as stored.
        place: The model's file, or its folder, in which external data may lie; None if the model came without a place
            on disk.
        name: What to call the tensor in an error.

    Raises:
        UnreadTypeError: If no weight has this type.
        ArtifactError: If the sizes disagree, or external data is not inside the folder.
    """
    dtype, shape, elements = _described(tensor, name)
    what = f"Tensor '{name}' of {dtype} {shape}"
    expected = (elements * _BITS[dtype] + 7) // 8
    try:
        if tensor.data_location == TensorProto.EXTERNAL:
            with _external(tensor, place, dtype, expected, name) as source:
                return _exactly(source, dtype, elements).reshape(shape)
        if tensor.HasField("raw_data"):
            raw = tensor.raw_data
            if len(raw) != expected:
                raise ArtifactError(f"{what} needs {expected} bytes and holds {len(raw)}.", REMEDY)
            return read_elements(io.BytesIO(raw), dtype, elements).reshape(shape)
        return _plain(numpy_helper.to_array(tensor), dtype)
    except (ValueError, TypeError, KeyError, EOFError, OSError) as error:
        raise ArtifactError(f"{what} cannot be read: {error}.", REMEDY) from None


def like(tensor: TensorProto, place: Path | None, name: str) -> npt.NDArray[Any]:
    """Return zeros of the type and shape that `to_numpy` would return, in no memory: no number is read.

    Args:
        tensor: As of `to_numpy`.
        place: As of `to_numpy`.
        name: As of `to_numpy`.

    Raises:
        UnreadTypeError: As `to_numpy`.
        ArtifactError: If it has no shape that a tensor can have.
    """
    dtype, shape, _ = _described(tensor, name)
    if dtype in INTEGER_BITS:
        kind: Any = np.uint8 if dtype.startswith("U") else np.int8
    else:
        kind = {"DOUBLE": np.float64, "INT32": np.int32, "INT64": np.int64}.get(dtype, np.float32)
    return np.broadcast_to(np.zeros((), kind), shape)


def _described(tensor: TensorProto, name: str) -> tuple[str, tuple[int, ...], int]:
    """Return the type, the shape and the number of elements."""
    dtype, shape = dtype_name(tensor), tuple(tensor.dims)
    if dtype not in _BITS:
        raise UnreadTypeError(f"Tensor '{name}' has element type {dtype}, which is not read here.", REMEDY)
    elements = math.prod(shape)
    if min(shape, default=0) < 0 or elements > MAX_ELEMENTS:
        raise ArtifactError(f"Tensor '{name}' says that its shape is {shape}.", REMEDY)
    return dtype, shape, elements


def _exactly(source: Bytes, dtype: str, elements: int) -> npt.NDArray[Any]:
    found = read_elements(source, dtype, elements)
    if isinstance(source, Varints) and not source.done:
        raise ValueError("it holds more numbers than its shape has")
    return found


def _plain(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype in INTEGER_BITS:
        return array.astype(np.uint8 if dtype.startswith("U") else np.int8, copy=False)
    return array.astype(np.float32) if dtype in ("FLOAT16", "BFLOAT16") else array


@contextmanager
def _external(tensor: TensorProto, place: Path | None, dtype: str, expected: int, name: str) -> Iterator[Bytes]:
    """Open a tensor's bytes: in the model's own file, or in a plain one inside its folder, reached through no link."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not all(isinstance(value, str) for value in entries.values()):  # protobuf hands out bytes where it is no UTF-8
        raise ArtifactError(f"Tensor '{name}' names its external data in no text: {entries}.", REMEDY)
    location = entries.get("location", "")
    if place is None:
        raise ArtifactError(f"Tensor '{name}' lies in another file ('{location}') and no folder was given.", REMEDY)
    here = location == HERE and not place.is_dir()
    path = place if here else beside(place if place.is_dir() else place.parent, location, name)
    offset, length = _integer(entries.get("offset", "0"), name), _integer(entries.get("length", str(expected)), name)
    encoded = here and VARINTS in entries
    if length != expected and not encoded:
        holds = f"holds {length}" if here else f"'{location}' is said to hold {length}"
        raise ArtifactError(f"Tensor '{name}' of {dtype} {tuple(tensor.dims)} needs {expected} bytes; {holds}.", REMEDY)
    # The model's own file is the user's choice, link or not; what it names is not.
    descriptor = os.open(path, os.O_RDONLY | (0 if here else getattr(os, "O_NOFOLLOW", 0)))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or offset + length > status.st_size:
            end = offset + length
            detail = f"Tensor '{name}' needs bytes {offset} to {end} of '{path.name}', which has {status.st_size}."
            raise ArtifactError(detail, REMEDY)
        file.seek(offset)
        yield Varints(file, length, VARINT_BYTES.get(dtype, 1)) if encoded else file


def beside(folder: Path, location: str, name: str) -> Path:
    """Return where external data lies.

    Raises:
        ArtifactError: If that is no file inside the folder.
    """
    named = 0 < len(location) <= 1024 and "\0" not in location
    outside = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
    parts = location.replace("\\", "/").split("/")
    root = folder.resolve()
    if not named or outside or ".." in parts or (root / location).resolve() != root.joinpath(*parts):
        raise ArtifactError(f"Tensor '{name}' points outside the model's folder: '{location}'.", REMEDY)
    path = root / location
    if not path.is_file():
        raise ArtifactError(f"The external data '{location}' of tensor '{name}' is missing.", REMEDY)
    return path


def _integer(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ArtifactError(f"Tensor '{name}' has external data at '{text}', which is no number.", REMEDY)
    return int(text)
