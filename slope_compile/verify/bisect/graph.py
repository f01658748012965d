"""An ONNX graph as segments: which values are comparable, what computes one from others, and that part as a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import onnx
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from slope_compile.qdq.activations import stored_quantizers
from slope_compile.qdq.graph import is_standard, scopes
from slope_compile.qdq.reader import trace_constant, weight_inputs
from slope_compile.qdq.tensors import load_model
from slope_compile.verify.bisect.points import Key
from slope_compile.verify.chain.runners import interface

NORMS = ("BatchNormalization", "LayerNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
WHOLE = 1 << 31  # bytes of a graph above which its shapes are not inferred


class OnnxGraph:
    """The main graph of an ONNX file.

    Args:
        path: The file; external data beside it.

    Attributes:
        path: The file.
        model: As stored, external data left where it is.
        inputs: Names of the graph's inputs.
        outputs: Names of its outputs.
        producer: Value -> the node that makes it.
        keys: What is comparable -> the value's name, in graph order.
        read: What quantizers read -> the value's name: the graph's own inputs too.
        layers: Layer name -> its multiplying node or norm; of several, the first.

    Raises:
        ArtifactError: If the file is missing or no ONNX model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = load_model(path)
        self.scope = next(iter(scopes(self.model)))
        self.inputs, self.outputs = interface(self.model.graph)
        self.producer = {name: node for node in self.model.graph.node for name in node.output if name}
        self._constants = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._varying = self._depend_on_inputs()
        self._users: dict[str, list[NodeProto]] = {}
        for node in self.model.graph.node:
            for name in set(reads(node)):
                self._users.setdefault(name, []).append(node)
        self.layers: dict[str, NodeProto] = {}
        self._quantizers = {one.output: one for one in stored_quantizers(path)}
        self.quantizers = {one.name: one for one in self._quantizers.values()}
        every = dict(self._all_keys())
        self.keys = {key: value for key, value in every.items() if value in self.producer}
        self.read = {key: value for key, value in every.items() if key.role == "read"}

    def layer_of(self, node: NodeProto) -> str | None:
        """Return the name of the layer that a node is, by its weight's initializer; None for other nodes."""
        if any(is_standard(node, op) for op in NORMS):
            candidates: tuple[int, ...] = (1,)
        else:
            candidates = weight_inputs(node)
        for index in candidates:
            if index >= len(node.input) or node.input[index] in self._varying:
                continue
            _, name, tensor = trace_constant(self.scope, node.input[index])
            if tensor is not None:
                return (name or node.name).removesuffix(".codes").removesuffix(".weight")
        return None

    def bias_add(self, node: NodeProto) -> NodeProto | None:
        """Return the Add of a constant vector behind a MatMul: the layer's bias."""
        users = self._users.get(node.output[0], [])
        if not is_standard(node, "MatMul") or len(users) != 1 or not is_standard(users[0], "Add"):
            return None
        others = [name for name in users[0].input if name != node.output[0]]
        if len(others) != 1 or others[0] in self._varying:
            return None
        _, _, tensor = trace_constant(self.scope, others[0])
        return users[0] if tensor is not None and len(tensor.dims) == 1 else None

    def constant(self, name: str) -> TensorProto | None:
        """Return the tensor that a name stands for, through what only moves or dequantizes it."""
        return None if name in self._varying else trace_constant(self.scope, name)[2]

    def is_varying(self, name: str) -> bool:
        """Return whether a value depends on the graph's inputs."""
        return name in self._varying

    def segment(self, value: str, cuts: Collection[str]) -> tuple[list[str], list[NodeProto]]:
        """Return what a value is computed from, up to the nearest cuts and the graph's inputs, and by which nodes.

        Args:
            value: Made by a node.
            cuts: Values at which to stop; `value` itself may be one.

        Returns:
            The values at the segment's beginning, and its nodes in graph order, those of constants included.
        """
        needed, ends, pending = set[int](), dict[str, None](), [self.producer[value]]
        while pending:
            node = pending.pop()
            if id(node) in needed:
                continue
            needed.add(id(node))
            for name in reads(node):
                if name in cuts or name in self.inputs:
                    ends[name] = None
                elif name in self.producer:
                    pending.append(self.producer[name])
        return list(ends), [node for node in self.model.graph.node if id(node) in needed]

    def part(self, given: Collection[str], wanted: Sequence[str]) -> onnx.ModelProto:
        """Return the model that computes some values from others; a wanted value that is also given is `made(NAME)`.

        Args:
            given: Values that become inputs, where anything reads them.
            wanted: Values that become outputs, each made by a node.
        """
        needed = {id(node) for value in wanted for node in self.segment(value, given)[1]}
        nodes = [node for node in self.model.graph.node if id(node) in needed]
        names = {name for node in nodes for name in reads(node)}
        graph = GraphProto(name=self.model.graph.name or "part")
        for node in nodes:
            copy = graph.node.add()
            copy.CopyFrom(node)
            for index, name in enumerate(copy.output):
                if name in given:
                    copy.output[index] = made(name)
        begins = [name for name in dict.fromkeys([*self.inputs, *given]) if name in names]
        graph.input.extend(helper.make_tensor_value_info(name, self.type_of(name), None) for name in begins)
        graph.output.extend(ValueInfoProto(name=made(name) if name in given else name) for name in wanted)
        graph.initializer.extend(tensor for name, tensor in self._constants.items() if name in names)
        graph.sparse_initializer.extend(
            tensor for tensor in self.model.graph.sparse_initializer if tensor.values.name in names
        )
        return helper.make_model(
            graph,
            opset_imports=list(self.model.opset_import),
            ir_version=self.model.ir_version,
            functions=list(self.model.functions),
        )

    def type_of(self, value: str) -> int:
        """Return ONNX's number of a value's element type; FLOAT where nobody says."""
        return self._types.get(value, TensorProto.FLOAT)

    def bytes_of(self, feed: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return the bytes of each float value whose shape follows from those of the inputs."""
        found = {}
        for value in self._inferred(feed):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
                size = 4
                for dim in dims:
                    size *= dim.dim_value
                found[value.name] = size
        return found

    @cached_property
    def _types(self) -> dict[str, int]:
        return {value.name: value.type.tensor_type.elem_type for value in self._inferred({})}

    def _inferred(self, feed: Mapping[str, Sequence[int]]) -> list[ValueInfoProto]:
        """Return what the file and ONNX's shape inference say of types and shapes, weights left out of it."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        known = {value.name: value for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)}
        for value in model.graph.input:
            for dim, length in zip(value.type.tensor_type.shape.dim, feed.get(value.name, ()), strict=False):
                dim.dim_value = int(length)
        if feed:  # shapes in the file are of a free batch: only inference knows them for this one
            given = [value for name, value in known.items() if name in feed]
            del model.graph.value_info[:]
            for value in model.graph.output:
                value.type.tensor_type.ClearField("shape")
        else:
            given = list(known.values())
        if model.ByteSize() > WHOLE:
            return given
        try:
            graph = onnx.shape_inference.infer_shapes(model).graph
        except Exception:  # an operator of another domain, say: its values have no known shape then
            return given
        return [*graph.value_info, *graph.output, *given]

    def _depend_on_inputs(self) -> set[str]:
        varying = set(self.inputs)
        for node in self.model.graph.node:
            if any(name in varying for name in reads(node)) or node.op_type.startswith("Random"):
                varying.update(filter(None, node.output))
        return varying

    def _all_keys(self) -> Iterator[tuple[Key, str]]:
        """Yield every key with its value, in graph order; a layer that several nodes are has a key for each."""
        calls: Counter[str] = Counter()
        for node in self.model.graph.node:
            if not node.output or not any(name in self._varying for name in node.output):
                continue
            quantizer = self._quantizers.get(node.output[0])
            if quantizer is not None:
                call = calls[f"{quantizer.name}:quantizer"]
                calls[f"{quantizer.name}:quantizer"] += 1
                yield Key(quantizer.name, "read", call), node.input[0]
                yield Key(quantizer.name, "quantizer", call), node.output[0]
                continue
            layer = self.layer_of(node)
            if layer is not None:
                yield from self._layer_keys(layer, calls[layer], node)
                calls[layer] += 1
            for value in filter(None, node.output):
                if not is_standard(node, "DequantizeLinear") and self._is_float(value):
                    yield Key(value, "value"), value
        for index, name in enumerate(self.outputs):
            yield Key(str(index), "result"), name

    def _layer_keys(self, layer: str, call: int, node: NodeProto) -> Iterator[tuple[Key, str]]:
        self.layers.setdefault(layer, node)
        varying = [name for name in node.input if name in self._varying]
        made_by = None if len(varying) != 1 else self.producer.get(varying[0])
        if made_by is not None and not is_standard(made_by, "DequantizeLinear"):  # that is a quantizer's
            yield Key(layer, "input", call), varying[0]
        yield Key(layer, "product", call), node.output[0]
        bias = self.bias_add(node)
        yield Key(layer, "output", call), (node if bias is None else bias).output[0]

    def _is_float(self, value: str) -> bool:
        return self.type_of(value) in FLOATS


def made(name: str) -> str:
    """Return the output of a part that holds what it makes of a value that it is also given."""
    return f"made({name})"


def reads(node: NodeProto) -> Iterator[str]:
    """Yield the values that a node reads, those that its subgraphs take from outside included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            yield from _captured(graph)


def _captured(graph: GraphProto) -> Iterable[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    names = [name for node in graph.node for name in reads(node)] + [value.name for value in graph.output]
    return [name for name in names if name not in own]
