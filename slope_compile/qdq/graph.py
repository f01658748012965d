"""Who makes a value: names of an ONNX graph, seen through subgraphs and local functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, numpy_helper

from slope_compile.errors import ArtifactError
from slope_compile.qdq.tensors import REMEDY

MULTIPLIES = ("Conv", "ConvTranspose", "MatMul", "Gemm")  # with a weight
MOVES = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity")  # values stay what they are
TURNS = ("Transpose", "Reshape", "Identity")  # of codes, before they are dequantized
MAX_DEPTH = 64  # subgraphs and function calls inside each other
MAX_NODES = 2_000_000  # visited in all: nested function calls can multiply a small file


class Scope:
    """The names visible in one graph, or in one call of a local function.

    Args:
        body: The graph or function.
        outer: The scope whose names a subgraph sees too; None for the main graph and for function bodies.
        bound: For a function body, formal input name -> (caller's scope, actual name).
        attributes: For a function body, the attributes that its nodes may refer to by name.

    Attributes:
        nodes: In the file's order.
        results: Names of what the graph or function hands out.
    """

    def __init__(
        self,
        body: GraphProto | FunctionProto,
        outer: Scope | None = None,
        bound: dict[str, tuple[Scope, str]] | None = None,
        attributes: dict[str, AttributeProto] | None = None,
    ) -> None:
        self.nodes = body.node
        named = [one.name for one in body.output] if isinstance(body, GraphProto) else body.output
        self.results = frozenset(named)
        self._outer = outer
        self._bound = bound or {}
        self._attributes = attributes or {}
        self._sources: dict[str, TensorProto | NodeProto] = {}
        for tensor in body.initializer if isinstance(body, GraphProto) else ():
            self._define(tensor.name, tensor)
        for node in body.node:
            constant = _constant(node) if is_standard(node, "Constant") else None
            for output in filter(None, node.output):
                self._define(output, constant or node)

    def _define(self, name: str, source: TensorProto | NodeProto) -> None:
        if not isinstance(name, str):  # protobuf hands out bytes where a name is no UTF-8
            raise ArtifactError(f"The ONNX graph has a value whose name is no text: {name!r}.", REMEDY)
        if name in self._sources:
            raise ArtifactError(f"The value '{name}' of the ONNX graph is made twice.", REMEDY)
        self._sources[name] = source

    def constants(self) -> Iterator[tuple[str, TensorProto]]:
        """Yield the initializers and the tensors of Constant nodes that are defined here."""
        yield from ((name, source) for name, source in self._sources.items() if isinstance(source, TensorProto))

    def find(self, name: str) -> tuple[Scope, str, TensorProto | NodeProto | None]:
        """Return where a name is defined, its name there, and what makes it; None for an input of the model."""
        scope: Scope = self
        for _ in range(2 * MAX_DEPTH):
            if name in scope._sources:
                return scope, name, scope._sources[name]
            if name in scope._bound:
                scope, name = scope._bound[name]
            elif scope._outer is not None:
                scope = scope._outer
            else:
                return scope, name, None
        raise ArtifactError(f"The value '{name}' of the ONNX graph is nested too deeply.", REMEDY)

    def integer(self, node: NodeProto, name: str, default: int) -> int:
        """Return an integer attribute.

        Raises:
            ArtifactError: If it is of another type.
        """
        attribute = self._attribute(node, name)
        return default if attribute is None else int(_typed(node, attribute, AttributeProto.INT).i)

    def integers(self, node: NodeProto, name: str, default: Iterable[int]) -> tuple[int, ...]:
        """Return an attribute that is a list of integers.

        Raises:
            ArtifactError: If it is of another type.
        """
        attribute = self._attribute(node, name)
        return tuple(default if attribute is None else _typed(node, attribute, AttributeProto.INTS).ints)

    def _attribute(self, node: NodeProto, name: str) -> AttributeProto | None:
        """Return an attribute; one that refers to a function's attribute is looked up in the call."""
        found = next((attribute for attribute in node.attribute if attribute.name == name), None)
        return self._attributes.get(found.ref_attr_name) if found is not None and found.ref_attr_name else found

    def call(self, function: FunctionProto, node: NodeProto) -> Scope:
        """Return the scope of a local function's body, called by `node`."""
        bound = {formal: (self, actual) for formal, actual in zip(function.input, node.input, strict=False) if actual}
        given = {attribute.name: attribute for attribute in (*function.attribute_proto, *node.attribute)}
        attributes = {name: self._attributes.get(a.ref_attr_name, a) for name, a in given.items()}
        return Scope(function, bound=bound, attributes=attributes)


def is_standard(node: NodeProto, op: str) -> bool:
    """Return whether a node is ONNX's own operator `op`, not another domain's of the same name."""
    return bool(node.op_type == op and node.domain in ("", "ai.onnx"))


def scopes(model: onnx.ModelProto) -> Iterator[Scope]:
    """Yield the main graph's scope, then those of all subgraphs and function calls, outer ones first.

    Raises:
        ArtifactError: If they nest too deeply (a function that calls itself), or are too many.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    pending = [(Scope(model.graph), 0)]
    visited = 0
    while pending:
        scope, depth = pending.pop()
        visited += 1 + len(scope.nodes)
        if depth > MAX_DEPTH or visited > MAX_NODES:
            raise ArtifactError("The ONNX graph nests its subgraphs or functions too deeply.", REMEDY)
        yield scope
        inner: list[Scope] = []
        for node in scope.nodes:
            function = functions.get((node.domain, node.op_type))
            if function is not None:
                inner.append(scope.call(function, node))
            for attribute in node.attribute:
                graphs = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
                inner.extend(Scope(graph, outer=scope) for graph in graphs)
        pending.extend((one, depth + 1) for one in reversed(inner))


def live_names(model: onnx.ModelProto) -> frozenset[str]:
    """Return the names of the main graph's values that its outputs depend on; names inside subgraphs all count."""
    made_by = {output: node for node in model.graph.node for output in filter(None, node.output)}
    waiting = [value.name for value in model.graph.output]
    live: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in live:
            continue
        live.add(name)
        if name in made_by:
            waiting += read_by(made_by[name])
    return frozenset(live)


def read_by(node: NodeProto) -> list[str]:
    """Return the names that a node reads, those of its subgraphs too, whoever defines them."""
    read: list[str] = []
    waiting = [node]
    while waiting:
        one = waiting.pop()
        read += filter(None, one.input)
        for attribute in one.attribute:
            for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                read += [value.name for value in graph.output]
                waiting += graph.node
    return read


def _typed(node: NodeProto, attribute: AttributeProto, kind: int) -> AttributeProto:
    if attribute.type != kind:
        raise ArtifactError(
            f"Attribute '{attribute.name}' of the {node.op_type} '{node.name}' has a wrong type.", REMEDY
        )
    return attribute


def _constant(node: NodeProto) -> TensorProto | None:
    """Return the tensor of a Constant node; None for strings and sparse tensors, which no weight is."""
    if len(node.attribute) != 1 or len(node.output) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value" and attribute.HasField("t"):
        tensor: TensorProto = attribute.t
        return tensor
    if attribute.name in ("value_float", "value_floats"):
        floats = attribute.floats if attribute.name.endswith("s") else attribute.f
        return numpy_helper.from_array(np.asarray(floats, np.float32), node.output[0])
    if attribute.name in ("value_int", "value_ints"):
        integers = attribute.ints if attribute.name.endswith("s") else attribute.i
        return numpy_helper.from_array(np.asarray(integers, np.int64), node.output[0])
    return None
