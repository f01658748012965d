"""Sizes of a graph's values per image: from the file where it says them, else inferred in a process of its own.

onnx.shape_inference is native code, and files of other tools have crashed it: here that costs the shapes, no more.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, ValueInfoProto

Shape = tuple[int | None, ...]

_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import onnx; "
    "model = onnx.ModelProto.FromString(sys.stdin.buffer.read()); "
    "sys.stdout.buffer.write(onnx.shape_inference.infer_shapes(model, data_prop=True).SerializeToString())"
)
_SECONDS = 60
_SMALL = 1024  # elements: such a tensor may say a shape; a weight's numbers never do
_MULTIPLE = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?:\*(\d+))?")  # 64*batch, as torch writes windows of a batch


class Shapes:
    """Shapes of the values of a model's main graph.

    Args:
        model: Its tensors may lie in another file.
        wanted: Names of values whose shapes matter; if the file has none for one of them, shapes are inferred.
    """

    def __init__(self, model: onnx.ModelProto, wanted: Iterable[str]) -> None:
        self._symbol, self._images = _batch(model.graph)
        graph = model.graph
        self._known = self._read([*graph.input, *graph.output, *graph.value_info])
        if any(None in self._known.get(name, (None,)) for name in wanted):
            inferred = _infer(model)
            if inferred is not None:
                found = self._read([*inferred.graph.output, *inferred.graph.value_info])
                self._known |= {name: shape for name, shape in found.items() if None not in shape}

    def of(self, name: str) -> Shape | None:
        """Return a value's shape with a dynamic batch taken as 1, None for sizes not known; None: not even its rank."""
        return self._known.get(name)

    def per_image(self, name: str) -> int | None:
        """Return how many elements a value has for one image; None if that is not known."""
        shape = self.of(name)
        if shape is None or None in shape:
            return None
        return math.ceil(math.prod(size for size in shape if size is not None) / self._images)

    def _read(self, values: Iterable[ValueInfoProto]) -> dict[str, Shape]:
        return {
            value.name: tuple(self._size(dim) for dim in value.type.tensor_type.shape.dim)
            for value in values
            if value.type.tensor_type.HasField("shape")
        }

    def _size(self, dim: onnx.TensorShapeProto.Dimension) -> int | None:
        if dim.HasField("dim_value"):
            return int(dim.dim_value) if dim.dim_value > 0 else None
        multiple = _MULTIPLE.fullmatch(dim.dim_param.replace(" ", ""))
        if multiple is None or multiple[2] != self._symbol:
            return None
        return int(multiple[1] or 1) * int(multiple[3] or 1)


def _batch(graph: onnx.GraphProto) -> tuple[str, int]:
    """Return the name of the first input's dynamic first axis, or "", and how many images a fixed one holds."""
    initializers = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in initializers and dims:
            return str(dims[0].dim_param), max(1, int(dims[0].dim_value))
    return "", 1


def _infer(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the model with inferred shapes, a dynamic batch set to 1; None if inference fails, crashes or hangs."""
    request = _without_weights(model)
    for value in request.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis == 0 and not dim.HasField("dim_value"):
                dim.dim_value = 1
    del request.graph.value_info[:]  # they may hold the batch's name, which is a number now
    for value in request.graph.output:
        value.type.tensor_type.ClearField("shape")
    command = [sys.executable, "-c", _CHILD, json.dumps(sys.path)]
    try:
        done = subprocess.run(command, input=request.SerializeToString(), capture_output=True, timeout=_SECONDS)
        inferred: onnx.ModelProto = onnx.ModelProto.FromString(done.stdout)
    except (subprocess.TimeoutExpired, DecodeError, RecursionError):
        return None
    return inferred if done.returncode == 0 else None


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy in which big tensors have shapes and no numbers."""
    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph = model.graph
    slim.graph.name = graph.name
    for field in ("node", "input", "output"):
        getattr(slim.graph, field).extend(getattr(graph, field))
    for tensor in graph.initializer:
        whole = math.prod(tensor.dims) <= _SMALL and tensor.data_location != TensorProto.EXTERNAL
        slim.graph.initializer.append(
            tensor if whole else TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
        )
    return slim
