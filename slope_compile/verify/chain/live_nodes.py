"""The nodes of an ONNX file that its outputs depend on, in its subgraphs and local functions too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, GraphProto, NodeProto, OperatorSetIdProto, TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.qdq.graph import MAX_DEPTH, MAX_NODES, Scope, is_standard, read_by
from slope_compile.qdq.tensors import REMEDY, UnreadTypeError, load_graph, to_numpy

SMALL = 8  # elements; a flag, a ratio and a list of axes have no more
_COPIES = ("Identity", "Cast")
_SHAPES_ONLY = ("Shape", "Size")  # the values that they read are no matter


@dataclass(frozen=True)
class LiveNode:
    """A node and where it is.

    Args:
        scope: The names that it sees.
        node: The node.
        opset: The version of ONNX's own operators there; 0 if none is imported.
        place: The file.
    """

    scope: Scope
    node: NodeProto
    opset: int
    place: Path

    @property
    def told(self) -> str:
        """The node in words: `node 'drop' (Dropout)`."""
        made = next(filter(None, self.node.output), "?")
        return f"node '{self.node.name or made}' ({self.node.op_type})"

    def asks(self, index: int) -> str:
        """Return the name of an input; empty where there is none."""
        return str(self.node.input[index]) if index < len(self.node.input) else ""

    def constant(self, index: int) -> npt.NDArray[np.generic] | None:
        """Return the numbers of a small input; None where there is none, or none that the file fixes.

        Raises:
            ArtifactError: If it is damaged.
        """
        scope, name = self.scope, self.asks(index)
        for _ in range(MAX_DEPTH):
            scope, name, source = scope.find(name)
            if isinstance(source, TensorProto):
                given = _referred(scope, name)  # a function's Constant may take its number from the call
                small = int(np.prod(source.dims, dtype=np.int64)) <= SMALL
                return given if given is not None else _numbers(source, self.place, name) if small else None
            if source is None or not source.input or not any(is_standard(source, op) for op in _COPIES):
                return None
            name = source.input[0]
        return None


def _numbers(tensor: TensorProto, place: Path, name: str) -> npt.NDArray[np.generic] | None:
    if tensor.data_type == TensorProto.BOOL:  # one byte each, too
        tensor, flags = TensorProto(), tensor
        tensor.CopyFrom(flags)
        tensor.data_type = TensorProto.UINT8
    try:
        return to_numpy(tensor, place, name)
    except UnreadTypeError:
        return None


def _referred(scope: Scope, name: str) -> npt.NDArray[np.generic] | None:
    maker = next((node for node in scope.nodes if name in node.output), None)
    asked = maker.attribute[0] if maker is not None and maker.attribute else None
    if maker is None or asked is None or not asked.ref_attr_name or asked.name != "value_int":
        return None
    return np.asarray(scope.integer(maker, asked.name, 0))


def live_nodes(onnx: Path) -> Iterator[LiveNode]:
    """Yield each node that an output of a file depends on; those of a function once for each call.

    Raises:
        ArtifactError: If it is no ONNX file, or its subgraphs and functions nest too deeply, or are too many.
    """
    model = load_graph(onnx)
    functions = {(one.domain, one.name): one for one in model.functions}
    results = [value.name for value in model.graph.output]
    waiting = [(Scope(model.graph), results, _opset(model.opset_import), 0)]
    visited = 0
    while waiting:
        scope, results, opset, depth = waiting.pop()
        visited += 1 + len(scope.nodes)
        if depth > MAX_DEPTH or visited > MAX_NODES:
            raise ArtifactError("The ONNX graph nests its subgraphs or functions too deeply.", REMEDY)
        wanted = _wanted(scope, results)
        for node in (one for one in scope.nodes if wanted.intersection(one.output)):
            function = functions.get((node.domain, node.op_type))
            if function is not None:
                inner = _results(function, node, wanted)
                waiting.append((scope.call(function, node), inner, _opset(function.opset_import) or opset, depth + 1))
                continue
            yield LiveNode(scope, node, opset, onnx)
            for attribute in node.attribute:
                for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                    inner = _results(graph, node, wanted) if node.op_type == "If" else [o.name for o in graph.output]
                    waiting.append((Scope(graph, outer=scope), inner, opset, depth + 1))


def _opset(imports: Iterable[OperatorSetIdProto]) -> int:
    return next((one.version for one in imports if one.domain in ("", "ai.onnx")), 0)


def _results(body: GraphProto | FunctionProto, node: NodeProto, wanted: frozenset[str]) -> list[str]:
    """Return those results of a body that what calls it hands on to somebody."""
    names = [one.name for one in body.output] if isinstance(body, GraphProto) else list(body.output)
    return [name for name, outside in zip(names, node.output, strict=False) if outside in wanted]


def _wanted(scope: Scope, results: Iterable[str]) -> frozenset[str]:
    """Return the values of one graph that its results depend on."""
    made_by = {output: node for node in scope.nodes for output in filter(None, node.output)}
    waiting, wanted = list(results), set[str]()
    while waiting:
        name = waiting.pop()
        maker = made_by.get(name)
        if name not in wanted and maker is not None and not any(is_standard(maker, op) for op in _SHAPES_ONLY):
            waiting += read_by(maker)
        wanted.add(name)
    return frozenset(wanted)
