"""An ONNX file in ONNX Runtime, any of its values to be had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, ValueInfoProto

from slope_compile.qdq.reader import iter_weights
from slope_compile.qdq.sites import Levels
from slope_compile.verify.bisect.graph import OnnxGraph, made
from slope_compile.verify.bisect.points import Key
from slope_compile.verify.chain.runners import Array, Arrays, load_session, output_names
from slope_compile.verify.parity.allowed import half_tensors
from slope_compile.verify.parity.tolerance import reduction_length

_CAST: dict[int, Any] = {
    TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64, TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
}  # fmt: skip


class OnnxSide:
    """An ONNX file on the CPU.

    Args:
        path: The file; external data beside it.
        optimized: With ONNX Runtime's default optimizations, which may fuse less where values are marked.
    """

    def __init__(self, path: Path, optimized: bool = False) -> None:
        self.path, self.optimized = path, optimized

    @cached_property
    def graph(self) -> OnnxGraph:
        """The file's graph, read when it is first asked for.

        Raises:
            ArtifactError: If the file is missing or no ONNX model.
        """
        return OnnxGraph(self.path)

    @cached_property
    def lengths(self) -> dict[str, int]:
        """K of each layer: the products in one of its outputs."""
        found = {}
        for weight in iter_weights(self.path, numbers=False):
            found[weight.name.removesuffix(".weight")] = reduction_length(weight)
        return found

    @cached_property
    def half(self) -> str | None:
        """The type of 16 bits in which some of it is computed, `fp16` or `bf16`; None where all is float32."""
        precision, _ = half_tensors(self.path)
        return None if precision == "fp32" else precision

    @property
    def free_batch(self) -> bool:
        """Whether the first axis of every input has no fixed length."""
        inputs = [value for value in self.graph.model.graph.input if value.name in self.graph.inputs]
        shapes = [value.type.tensor_type.shape.dim for value in inputs]
        return all(not dims or not dims[0].HasField("dim_value") for dims in shapes)

    def keys(self, feed: Arrays) -> dict[Key, int | None]:
        """Return its comparable tensors in graph order, with their bytes as float32 where shapes can be inferred."""
        sizes = self.graph.bytes_of({name: array.shape for name, array in feed.items()})
        return {key: sizes.get(value) for key, value in self.graph.keys.items()}

    def values(self, feed: Arrays, keys: Iterable[Key]) -> dict[Key, Array]:
        """Run it from its inputs and return some tensors.

        An optimized file is run whole, with the tensors marked: its optimizer looks at what reads a value.
        """
        wanted = {key: self.graph.read[key] if key.role == "read" else self.graph.keys[key] for key in keys}
        names = [name for name in dict.fromkeys(wanted.values()) if name not in self.graph.inputs]
        found = self._marked(feed, names) if self.optimized else self.compute(feed, {}, names)
        return {key: found[name] if name in found else _plain(feed[name]) for key, name in wanted.items()}

    def compute(
        self,
        feed: Arrays,
        given: Mapping[str, Array],
        wanted: Sequence[str],
        change: Callable[[onnx.ModelProto], None] | None = None,
    ) -> dict[str, Array]:
        """Return values computed from others: each from those given that are nearest before it, or from the inputs.

        Args:
            feed: The graph's inputs.
            given: Value -> what to put in its place, for all that read it.
            wanted: Values to return; what is made of a given one, not what is put there.
            change: Makes another model of the nodes that compute them.
        """
        if not wanted:
            return {}
        part = self.graph.part(given.keys(), wanted)
        if change is not None:
            change(part)
        inputs = [value.name for value in part.graph.input]
        with np.errstate(over="ignore"):
            arrays = {name: self.typed(name, given[name]) if name in given else feed[name] for name in inputs}
        names = [made(name) if name in given else name for name in wanted]
        return dict(zip(wanted, self._run(part, arrays, names), strict=True))

    def length(self, layer: str) -> int:
        """Return K of a layer; 0 for what is no layer."""
        return self.lengths.get(layer, 0)

    def operator(self, layer: str) -> str:
        """Return the operator of a layer: Conv, MatMul, BatchNormalization, ..."""
        return str(self.graph.layers[layer].op_type)

    def levels(self) -> Mapping[str, Levels]:
        """Return its quantizers of activations by name."""
        return self.graph.quantizers

    def results(self, feed: Arrays) -> list[Array]:
        """Run the file as it is and return its outputs."""
        session = load_session(str(self.path), self.optimized)
        return [_plain(array) for array in session.run(output_names(session), dict(feed))]

    def results_when_marked(self, feed: Arrays, keys: Iterable[Key]) -> list[Array]:
        """Run the whole file with tensors marked as outputs, and return its own outputs."""
        found = self._marked(feed, [*self.graph.outputs, *(self.graph.keys[key] for key in keys)])
        return [found[name] for name in self.graph.outputs]

    def _marked(self, feed: Arrays, names: Sequence[str]) -> dict[str, Array]:
        model = onnx.ModelProto()
        model.CopyFrom(self.graph.model)
        extra = [name for name in dict.fromkeys(names) if name not in self.graph.outputs]
        model.graph.output.extend(ValueInfoProto(name=name) for name in extra)
        return dict(zip(names, self._run(model, feed, names), strict=True))

    def _run(self, model: onnx.ModelProto, feed: Arrays, names: Sequence[str]) -> list[Array]:
        session = load_session(model.SerializeToString(), self.optimized, self.path.parent)
        return [_plain(array) for array in session.run(list(names), dict(feed))]

    def typed(self, name: str, array: Array) -> Array:
        """Return an array in the type that the file gives a value."""
        kind = self.graph.type_of(name)
        return array.astype(_CAST[kind], copy=False) if kind in _CAST else array


def _plain(array: Any) -> Array:
    return array.astype(np.float32) if array.dtype in (np.float16, np.float64) else np.asarray(array)
