"""ONNX files and their tensors as numpy arrays: nothing a file says about itself is believed before it is checked."""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, numpy_helper

from slope_compile.errors import ArtifactError

MAX_MODEL_BYTES = 2**31  # protobuf's own limit: bigger models keep their weights in external data
MAX_ELEMENTS = 2**32

REMEDY = "Export the model again; a file that something else wrote must be valid ONNX."
INTEGER_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8}
_BITS = INTEGER_BITS | {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "DOUBLE": 64, "INT32": 32, "INT64": 64}


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, external data left where it is.

    Raises:
        ArtifactError: If the file is missing, too big, or no ONNX model.
    """
    if not path.is_file():
        raise ArtifactError(f"There is no ONNX file {path}.", "Check the path, or export the model first.")
    size = path.stat().st_size
    if size > MAX_MODEL_BYTES:
        raise ArtifactError(f"{path} is {size} bytes; an ONNX file has at most {MAX_MODEL_BYTES}.", REMEDY)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no ONNX model, or is cut off: {error}.", REMEDY) from None
    if not model.HasField("graph"):
        raise ArtifactError(f"{path} holds no graph: it is no ONNX model, or is cut off.", REMEDY)
    return model


def dtype_name(tensor: TensorProto) -> str:
    """Return ONNX's name of the element type, such as `INT4`; `UNKNOWN` for a number that is no type."""
    known = TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(tensor.data_type)) if tensor.data_type in known else "UNKNOWN"


def element_bits(dtype: str) -> int:
    """Return the bits that one stored element of an ONNX type takes."""
    return _BITS[dtype]


def to_numpy(tensor: TensorProto, folder: Path | None, name: str) -> npt.NDArray[Any]:
    """Return the elements: 2-, 4- and 8-bit integers as int8 or uint8, half types as float32, others as they are.

    Args:
        tensor: The tensor as stored.
        folder: Where external data may lie; None if the model came without a place on disk.
        name: What to call the tensor in an error.

    Raises:
        ArtifactError: If no weight has this type, the sizes disagree, or external data is not inside `folder`.
    """
    dtype = dtype_name(tensor)
    if dtype not in _BITS:
        raise ArtifactError(f"Tensor '{name}' has element type {dtype}, which is not read here.", REMEDY)
    shape = tuple(tensor.dims)
    elements = math.prod(shape)
    if min(shape, default=0) < 0 or elements > MAX_ELEMENTS:
        raise ArtifactError(f"Tensor '{name}' says that its shape is {shape}.", REMEDY)
    expected = (elements * _BITS[dtype] + 7) // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor = TensorProto(dims=shape, data_type=tensor.data_type, raw_data=_external(tensor, folder, expected, name))
    if tensor.HasField("raw_data") and len(tensor.raw_data) != expected:
        raise ArtifactError(
            f"Tensor '{name}' of {dtype} {shape} needs {expected} bytes and holds {len(tensor.raw_data)}.", REMEDY
        )
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"Tensor '{name}' of {dtype} {shape} cannot be read: {error}.", REMEDY) from None
    return _plain(array, dtype)


def _plain(array: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    if dtype in INTEGER_BITS:
        return array.astype(np.uint8 if dtype.startswith("U") else np.int8, copy=False)
    return array.astype(np.float32) if dtype in ("FLOAT16", "BFLOAT16") else array


def _external(tensor: TensorProto, folder: Path | None, expected: int, name: str) -> bytes:
    """Read a tensor's external bytes; the file must be a plain one inside `folder`, reached through no link."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if not all(isinstance(value, str) for value in entries.values()):  # protobuf hands out bytes where it is no UTF-8
        raise ArtifactError(f"Tensor '{name}' names its external data in no text: {entries}.", REMEDY)
    location = entries.get("location", "")
    if folder is None:
        raise ArtifactError(f"Tensor '{name}' lies in another file ('{location}') and no folder was given.", REMEDY)
    named = 0 < len(location) <= 1024 and "\0" not in location
    outside = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
    parts = location.replace("\\", "/").split("/")
    root = folder.resolve()
    if not named or outside or ".." in parts or (root / location).resolve() != root.joinpath(*parts):
        raise ArtifactError(f"Tensor '{name}' points outside the model's folder: '{location}'.", REMEDY)
    offset, length = _integer(entries.get("offset", "0"), name), _integer(entries.get("length", str(expected)), name)
    if length != expected:
        raise ArtifactError(f"Tensor '{name}' needs {expected} bytes; '{location}' is said to hold {length}.", REMEDY)
    path = root / location
    if not path.is_file():
        raise ArtifactError(f"The external data '{location}' of tensor '{name}' is missing.", REMEDY)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or offset + length > status.st_size:
            end = offset + length
            detail = f"Tensor '{name}' needs bytes {offset} to {end} of '{location}', which has {status.st_size}."
            raise ArtifactError(detail, REMEDY)
        file.seek(offset)
        return file.read(length)


def _integer(text: str, name: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ArtifactError(f"Tensor '{name}' has external data at '{text}', which is no number.", REMEDY)
    return int(text)
