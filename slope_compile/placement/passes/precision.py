"""Turns a float32 Q/DQ graph into a strongly typed one that computes in FP16 or BF16 wherever nothing is quantized.

The law of every placement holds: a weight is codes × scale in float32, bit for bit, and a Cast follows its
DequantizeLinear. Scales, QuantizeLinear, DequantizeLinear, inputs and outputs of the graph stay float32. Which nodes
become half: `half_nodes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from slope_compile.errors import BackendError
from slope_compile.placement.passes.half_constants import Array, to_half
from slope_compile.placement.passes.half_nodes import constant, half_nodes, int8_products
from slope_compile.placement.passes.slots import FLOAT, admit_bfloat16, find_schema, formal
from slope_compile.placement.passes.value_types import infer_types
from slope_compile.qdq.graph import is_standard, scopes
from slope_compile.qdq.tensors import dtype_name, load_graph
from slope_compile.targets.backends import Backend
from slope_compile.targets.target import Target

Precision = Literal["fp32", "fp16", "bf16"]
TYPES: Mapping[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_SUBGRAPHS = ("Loop", "If", "Scan")
_COORDINATES = ("NonMaxSuppression", "RoiAlign")


def resolve_precision(
    model: Path, wanted: Literal["auto", "fp32", "fp16", "bf16"], target: Target, backend: Backend
) -> tuple[Precision, str]:
    """Return the type of the activations that are not quantized, and why.

    Args:
        model: The exported ONNX file.
        wanted: The recipe's; `auto`: FP16 where target and graph allow it.
        target: For which GPU.
        backend: Who builds.

    Raises:
        BackendError: If the type asked for is not to be had on the target, or the graph cannot be turned into it.
        ArtifactError: If the file is no ONNX model.
    """
    if wanted == "fp32":
        return "fp32", "asked for"
    name = TYPES["bf16" if wanted == "bf16" else "fp16"].name
    proto = load_graph(model)
    found = {op for scope in scopes(proto) for node in scope.nodes for op in _SUBGRAPHS if is_standard(node, op)}
    subgraphs = f"the graph has {' and '.join(sorted(found))}, whose bodies stay float32" if found else ""
    lacking = f"{target.devices} has no {name}" if name not in target.types else ""
    if wanted != "auto":
        if lacking or subgraphs:
            raise BackendError(
                f"{model.name} cannot be built in {wanted.upper()} by {backend.title} for {target.name}: "
                f"{lacking or subgraphs}.",
                "Set `build.precision: auto`, or fp32.",
            )
        return wanted, "asked for"
    chosen = {dtype_name(tensor) for tensor in proto.graph.initializer} & {"FLOAT16", "BFLOAT16"}
    typed = f"the file chooses its types itself: it holds {' and '.join(sorted(chosen))} tensors" if chosen else ""
    boxes = {op for scope in scopes(proto) for node in scope.nodes for op in _COORDINATES if is_standard(node, op)}
    pixels = f"{' and '.join(sorted(boxes))}: FP16 has no fractions of a pixel from 1024 on" if boxes else ""
    against = lacking or subgraphs or typed or pixels
    return ("fp32", against) if against else ("fp16", f"{target.devices} multiplies FP16 faster than FP32")


class SetPrecision(ir.passes.InPlacePass):
    """Makes a graph half precision where it computes in floats, with as few Casts as types need.

    Float initializers of half nodes become half; one that float32 nodes read too is there in both types, the half one
    as NAME.fp16 or NAME.bf16. With BF16 an opset below 22 becomes 22, where convolutions take it.

    Args:
        precision: `fp16` or `bf16`; `fp32` changes nothing.
    """

    def __init__(self, precision: Precision) -> None:
        self._precision = precision
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._constants: dict[ir.Value, list[tuple[Array, ir.Value]]] = {}
        self._names: set[str | None] = set()
        self._before: tuple[object, ...] = ()

    def requires(self, model: ir.Model) -> None:
        """No node has a subgraph: values would change their type under it."""
        for node in model.graph if self._precision != "fp32" else ():
            if any(one.type in _GRAPHS for one in node.attributes.values()):
                raise ir.passes.PreconditionError(f"the {node.op_type} '{node.name}' has a subgraph")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Choose the nodes, give them half inputs, and cast back for the others."""
        if self._precision == "fp32":
            return ir.passes.PassResult(model, modified=False)
        graph, half = model.graph, TYPES[self._precision]
        _prepare(model, half)
        self._before = _unchanging(graph)
        self._names = {value.name for node in graph for value in node.outputs} | {*graph.initializers}
        chosen = half_nodes(graph, model.opset_imports.get("", 0), half)
        narrowed = {
            value
            for node, found in chosen.items()
            for value, changes in zip(node.outputs, found.outputs, strict=True)
            if changes
        }
        for changed in narrowed:
            changed.type = ir.TensorType(half)
        for node in list(graph):
            wanted = chosen[node].inputs if node in chosen else (False,) * len(node.inputs)
            for index, (value, to_be_half) in enumerate(zip(node.inputs, wanted, strict=True)):
                if value is not None and to_be_half and value not in narrowed:
                    node.replace_input_with(index, self._half(graph, node, index, value))
                elif value is not None and not to_be_half and value in narrowed:
                    node.replace_input_with(index, self._cast(graph, value, FLOAT))
        for output in [value for value in graph.outputs if value in narrowed]:
            self._answer(graph, output)
        self._take_names(graph)
        _join_casts(graph)
        return ir.passes.PassResult(model, modified=bool(chosen))

    def ensures(self, model: ir.Model) -> None:
        """Inputs, outputs and INT8 products are what they were, and every node gets tensors of types that it takes."""
        if self._precision == "fp32":
            return
        if _unchanging(model.graph) != self._before:
            raise ir.passes.PostconditionError("inputs, outputs or INT8 products of the graph changed")
        for node in model.graph:
            _require_types(node, model.opset_imports.get("", 0))

    def _half(self, graph: ir.Graph, node: ir.Node, index: int, value: ir.Value) -> ir.Value:
        """Return a float32 value in half precision: a constant rounded once, anything else behind a Cast."""
        half = TYPES[self._precision]
        array = constant(value)
        rounded = None if array is None else to_half(node, index, array, half)
        if rounded is None:
            return self._cast(graph, value, half)
        for known, there in self._constants.get(value, ()):
            if known.tobytes() == rounded.tobytes():
                return there
        name = self._free(f"{value.name}.{self._precision}")
        tensor = ir.tensor(rounded, dtype=half, name=name)
        new = ir.Value(name=name, type=ir.TensorType(half), shape=ir.Shape(rounded.shape), const_value=tensor)
        graph.register_initializer(new)
        self._constants.setdefault(value, []).append((rounded, new))
        return new

    def _cast(self, graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
        """Return a value in another type, one Cast for all who read it so."""
        if (value, to) not in self._casts:
            suffix = "fp32" if to == FLOAT else self._precision
            cast = ir.node("Cast", [value], {"to": to}, name=f"{value.name}.to_{suffix}")
            made = cast.outputs[0]
            made.name, made.type, made.shape = self._free(f"{value.name}.{suffix}"), ir.TensorType(to), value.shape
            producer = value.producer()
            if producer is None:
                graph.insert_before(graph[0], cast)
            else:
                graph.insert_after(producer, cast)
            self._casts[value, to] = made
        return self._casts[value, to]

    def _answer(self, graph: ir.Graph, value: ir.Value) -> None:
        """Let a Cast make an output of the graph, under its name."""
        made, name = self._cast(graph, value, FLOAT), value.name
        value.name = self._free(f"{name}.{self._precision}")
        made.name = name
        for index, output in enumerate(graph.outputs):
            if output is value:
                graph.outputs[index] = made

    def _take_names(self, graph: ir.Graph) -> None:
        """Give the half constants of those that nobody reads any more their names."""
        for value, made in self._constants.items():
            if not value.uses() and not value.is_graph_output():
                name, new = value.name, made[0][1]
                del graph.initializers[str(name)], graph.initializers[str(new.name)]
                new.name = name
                graph.register_initializer(new)

    def _free(self, name: str) -> str:
        """Return a name that no value has yet."""
        found = next(one for one in chain([name], (f"{name}_{i}" for i in count(1))) if one not in self._names)
        self._names.add(found)
        return found


def _prepare(model: ir.Model, half: ir.DataType) -> None:
    """Make every constant an initializer, and find the types that the file does not tell."""
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if half == ir.DataType.BFLOAT16:
        admit_bfloat16(model)
    infer_types(model.graph, model.opset_imports.get("", 0))


def _unchanging(graph: ir.Graph) -> tuple[object, ...]:
    """Return what must be the same afterwards: names and types of inputs and outputs, and the INT8 products."""
    ends = [(value.name, value.dtype) for value in (*graph.inputs, *graph.outputs)]
    return ends, [node.name for node in int8_products(graph)]


def _join_casts(graph: ir.Graph) -> None:
    """Let a Cast behind one to float32 read what that one reads, and drop those that do nothing."""
    for node in [node for node in graph if node.op_type == "Cast" and node.domain == ""]:
        value, made = node.inputs[0], node.outputs[0]
        before = None if value is None else value.producer()
        if value is None or before is None:
            continue
        source = before.inputs[0] if before.op_type == "Cast" and value.dtype == FLOAT else None
        if source is not None and source.dtype not in (None, ir.DataType.DOUBLE):
            node.replace_input_with(0, source)
            if not value.uses() and not value.is_graph_output():
                graph.remove(before, safe=True)
        read = node.inputs[0]
        if read is not None and read.dtype == made.dtype and not made.is_graph_output():
            made.replace_all_uses_with(read)
            graph.remove(node, safe=True)


def _require_types(node: ir.Node, opset: int) -> None:
    """Raise where the tensors of one type variable have several types, or one that it does not allow."""
    schema = find_schema(node, opset)
    if schema is None:
        return
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    seen: dict[str, ir.DataType] = {}
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is None or value.dtype not in (FLOAT, *TYPES.values()):
                continue
            variable = formal(parameters, index)
            kind = f"tensor({value.dtype.name.lower()})"
            if kind not in allowed.get(variable, [variable]) or seen.setdefault(variable, value.dtype) != value.dtype:
                raise ir.passes.PostconditionError(
                    f"the {node.op_type} '{node.name}' cannot take '{value.name}' as {value.dtype}"
                )
