"""The bytes of a file's tensors: whether they are there, inside the folder, and as many as declared."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnx import TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import ONNX
from slope_compile.lint.view import View
from slope_compile.qdq.tensors import MAX_ELEMENTS, dtype_name, element_bits, to_numpy

_OTHER_BITS = {
    "BOOL": 8, "INT16": 16, "UINT16": 16, "UINT32": 32, "UINT64": 64, "COMPLEX64": 64, "COMPLEX128": 128,
    "FLOAT8E4M3FN": 8, "FLOAT8E4M3FNUZ": 8, "FLOAT8E5M2": 8, "FLOAT8E5M2FNUZ": 8, "FLOAT8E8M0": 8, "FLOAT4E2M1": 4,
}  # fmt: skip


@rule(
    "external-data",
    "error",
    "External data lies inside the model's folder, and is all there",
    "onnx.ai/onnx/repo-docs/ExternalData.html; slope-compile follows no path and no link out of the folder",
    "Keep the data file beside the model, and name it relative to the model.",
)
def external_data(view: View) -> Iterator[Hit]:
    """External data that is missing, too short, or somewhere else."""
    for tensor in view.tensors:
        if tensor.data_location == TensorProto.EXTERNAL and (problem := _problem(view, tensor)):
            yield Hit(f"{tensor.name}", problem)


@rule(
    "tensor-data",
    "error",
    "A tensor holds as many bytes as its shape and type need",
    f"{ONNX}; onnx.proto, TensorProto",
    "The file was cut or edited: export the model again.",
)
def tensor_data(view: View) -> Iterator[Hit]:
    """Tensors whose shape, type and bytes disagree."""
    for tensor in view.tensors:
        if tensor.data_location != TensorProto.EXTERNAL and (problem := _problem(view, tensor)):
            yield Hit(f"{tensor.name}", problem)


def _problem(view: View, tensor: TensorProto) -> str | None:
    """Say what is wrong with a tensor's bytes; None where nothing is, or where the type has no fixed size (STRING)."""
    bits = _bits(dtype_name(tensor))
    elements = math.prod(tensor.dims)
    if bits is None:
        return None
    if min(tensor.dims, default=0) < 0 or elements > MAX_ELEMENTS:
        return f"says that its shape is {list(tensor.dims)}"
    expected = (elements * bits + 7) // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        # Read as bytes: only that they are there counts here.
        tensor = TensorProto(
            dims=[expected], data_type=TensorProto.UINT8, data_location=TensorProto.EXTERNAL,
            external_data=tensor.external_data, name=tensor.name,
        )  # fmt: skip
    elif tensor.HasField("raw_data"):
        held = len(tensor.raw_data)
        return (
            None
            if held == expected
            else f"{dtype_name(tensor)} {list(tensor.dims)} needs {expected} bytes, holds {held}"
        )
    elif dtype_name(tensor) in _OTHER_BITS:
        return None
    try:
        to_numpy(tensor, view.folder, f"{tensor.name}")
    except ArtifactError as error:
        return error.problem.rstrip(".")
    return None


def _bits(dtype: str) -> int | None:
    try:
        return element_bits(dtype)
    except KeyError:
        return _OTHER_BITS.get(dtype)
