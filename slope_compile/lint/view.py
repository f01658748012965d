"""The graph as the rules look at it: who makes a value, who uses it, which weights there are.

Forgiving: what cannot be read is None here, and a rule of its own says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.placement.situation import Situation
from slope_compile.qdq.epilogue import Readers, leaves_as_int8, readers
from slope_compile.qdq.graph import MOVES, MULTIPLIES, TURNS, Scope, is_standard, scopes
from slope_compile.qdq.reader import trace_constant, weight_inputs, weight_of
from slope_compile.qdq.tensors import dtype_name, to_numpy
from slope_compile.qdq.weights import CodedWeight

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
CONVOLUTIONS = ("Conv", "ConvTranspose")
_SAME_TYPE = frozenset(
    {
        *MULTIPLIES, *MOVES, "Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "Erf", "Gelu", "Softmax", "Add", "Sub",
        "Mul", "Div", "BatchNormalization", "LayerNormalization", "AveragePool", "GlobalAveragePool", "MaxPool",
        "Concat", "Slice", "Pad",
    }
)  # fmt: skip
_FOLLOWED = 64  # nodes one behind the other


@dataclass(frozen=True, eq=False)
class Site:
    """A node where it stands."""

    scope: Scope
    node: NodeProto

    @property
    def name(self) -> str:
        """The node's name, or what it makes where it has none."""
        made = next(iter(self.node.output), "")
        return str(self.node.name or f"{self.node.op_type} of '{made}'")

    def runs(self, *ops: str) -> bool:
        """Whether it is one of ONNX's own operators."""
        return any(is_standard(self.node, op) for op in ops)


@dataclass(frozen=True, eq=False)
class Value:
    """A value: where it is defined, its name there, and what makes it (None: an input of the model)."""

    scope: Scope
    name: str
    maker: NodeProto | TensorProto | None

    @property
    def key(self) -> tuple[int, str]:
        """What tells values apart."""
        return id(self.scope), self.name

    @property
    def site(self) -> Site | None:
        """The node that makes it."""
        return Site(self.scope, self.maker) if isinstance(self.maker, NodeProto) else None


@dataclass(frozen=True, eq=False)
class Dequantized:
    """How a value was dequantized: the DequantizeLinear, the QuantizeLinear before it, whether it is a constant's."""

    dequantize: Site
    quantize: Site | None
    constant: bool


@dataclass(frozen=True, eq=False)
class Use:
    """A Conv, ConvTranspose, Gemm or MatMul with the constant that it multiplies with.

    Attributes:
        site: The node.
        weight: None where it multiplies two computed values, or where the weight cannot be read.
        problem: Why the weight cannot be read.
        activation: The computed factor; None where there is none.
        movable: Whether placement can hold the same values in another form: it can where the codes have no zero point,
            and nothing but DequantizeLinear reads them.
    """

    site: Site
    weight: CodedWeight | None
    problem: str | None
    activation: Value | None
    movable: bool


class View:
    """One file, for one situation.

    Args:
        model: The file's content.
        folder: Where its external data may lie.
        situation: For whom it is judged.

    Raises:
        ArtifactError: If the graph defines a value twice, or nests too deeply.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path, situation: Situation) -> None:
        self.model, self.folder, self.situation = model, folder, situation
        self.scopes = list(scopes(model))
        self.sites = [Site(scope, node) for scope in self.scopes for node in scope.nodes]
        self.opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
        self._arrays: dict[int, npt.NDArray[Any] | None] = {}

    def of(self, *ops: str) -> Iterator[Site]:
        """Yield the nodes of ONNX's own operators."""
        return (site for site in self.sites if site.runs(*ops))

    def input(self, site: Site, index: int) -> Value | None:
        """Return an input of a node; None where it has none."""
        if index >= len(site.node.input) or not site.node.input[index]:
            return None
        return Value(*site.scope.find(site.node.input[index]))

    def output(self, site: Site) -> Value | None:
        """Return what a node makes."""
        made = next(iter(site.node.output), "")
        return Value(site.scope, made, site.node) if made else None

    def users(self, site: Site) -> list[Site]:
        """Return who reads the first output of a node."""
        made = next(iter(site.node.output), "")
        return [Site(*user) for user in self._readers.get((id(site.scope), made), [])] if made else []

    def leaves_as_int8(self, site: Site) -> bool:
        """Whether a layer's output is quantized, and nothing else, directly or behind what TensorRT fuses with it."""
        made = next(iter(site.node.output), "")
        return bool(made) and leaves_as_int8(site.scope, made, self._readers)

    def before(self, value: Value | None) -> Value | None:
        """Return what a value was before it was only moved."""
        for _ in range(_FOLLOWED):
            site = value.site if value is not None else None
            if site is None or not site.runs(*MOVES):
                return value
            value = self.input(site, 0)
        return None

    def after(self, site: Site, *through: str) -> list[Site]:
        """Return who reads a node's output, seen through moves and the given operators."""
        found, pending, seen = [], [site], {id(site.node)}
        while pending:
            for user in self.users(pending.pop()):
                if id(user.node) in seen:
                    continue
                seen.add(id(user.node))
                if user.runs(*MOVES, *through):
                    pending.append(user)
                else:
                    found.append(user)
        return found

    def dequantized(self, value: Value | None) -> Dequantized | None:
        """Return how a value was dequantized, seen through moves; None for one that was not."""
        value = self.before(value)
        site = value.site if value is not None else None
        if site is None or not site.runs("DequantizeLinear"):
            return None
        integers = self.before(self.input(site, 0))
        maker = integers.site if integers is not None else None
        if maker is None or not maker.runs("QuantizeLinear"):
            return Dequantized(site, None, integers is not None and isinstance(integers.maker, TensorProto))
        return Dequantized(site, maker, self.is_constant(self.input(maker, 0)))

    def is_quantized(self, value: Value | None) -> bool:
        """Whether a value is an activation that was quantized and dequantized."""
        found = self.dequantized(value)
        return found is not None and not found.constant

    def is_constant(self, value: Value | None) -> bool:
        """Whether a value follows from constants alone."""
        pending, seen = [value], 0
        while pending:
            one, seen = pending.pop(), seen + 1
            if one is None or seen > _FOLLOWED:
                return False
            if isinstance(one.maker, TensorProto):
                continue
            if one.site is None or not one.site.node.input:
                return False
            pending += [self.input(one.site, i) for i, name in enumerate(one.site.node.input) if name]
        return True

    def array(self, value: Value | None) -> npt.NDArray[Any] | None:
        """Return a constant; None for anything else, or one that cannot be read."""
        value = self.before(value)
        tensor = value.maker if value is not None else None
        if value is None or not isinstance(tensor, TensorProto):
            return None
        if id(tensor) not in self._arrays:  # the scope holds the tensor, so that no other gets its id
            try:
                self._arrays[id(tensor)] = to_numpy(tensor, self.folder, f"{value.name}")
            except ArtifactError:
                self._arrays[id(tensor)] = None
        return self._arrays[id(tensor)]

    def dtype(self, value: Value | None) -> str | None:
        """Return ONNX's name of a value's element type; None where nothing tells."""
        for _ in range(_FOLLOWED):
            if value is None:
                return None
            if isinstance(value.maker, TensorProto):
                return dtype_name(value.maker)
            site = value.site
            if site is not None and site.runs("Cast"):
                return _named(self.integer(site, "to", 0))
            if site is not None and site.runs("QuantizeLinear"):
                if self.input(site, 2) is None:
                    return _named(self.integer(site, "output_dtype", 0) or TensorProto.UINT8)
                value = self.input(site, 2)
            elif site is not None and site.runs("DequantizeLinear"):
                if asked := self.integer(site, "output_dtype", 0):
                    return _named(asked)
                value = self.input(site, 1)
            elif site is None or value.key in self._declared or not site.runs(*_SAME_TYPE):
                return self._declared.get(value.key)
            else:
                value = self.input(site, 0)
        return None

    def integer(self, site: Site, name: str, default: int) -> int:
        """Return an integer attribute; the default where it is of another type, of which a rule of its own tells."""
        try:
            return site.scope.integer(site.node, name, default)
        except ArtifactError:
            return default

    @cached_property
    def uses(self) -> list[Use]:
        """Every Conv, ConvTranspose, Gemm and MatMul, in graph order."""
        return [self._use(site) for site in self.of(*MULTIPLIES)]

    @cached_property
    def movable(self) -> frozenset[str]:
        """Names of the weights that placement can hold in another form, of their codes, too."""
        names = [use.weight.name for use in self.uses if use.weight is not None and use.movable]
        return frozenset((*names, *(f"{name}.codes" for name in names)))

    @cached_property
    def quantizes_activations(self) -> bool:
        """Whether any activation is quantized."""
        return any(not self.is_constant(self.input(site, 0)) for site in self.of("QuantizeLinear"))

    @cached_property
    def tensors(self) -> list[TensorProto]:
        """Every initializer and every tensor of a Constant node, of all graphs and functions."""
        found: list[TensorProto] = []
        pending: list[GraphProto] = [self.model.graph]
        nodes = [node for function in self.model.functions for node in function.node]
        while pending or nodes:
            if pending:
                graph = pending.pop()
                found += graph.initializer
                nodes += graph.node
            for node in nodes:
                for attribute in node.attribute:
                    found += [attribute.t] if attribute.HasField("t") else []
                    pending += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            nodes = []
        return found

    @cached_property
    def _readers(self) -> Readers:
        return readers(self.scopes)

    @cached_property
    def _declared(self) -> dict[tuple[int, str], str | None]:
        graph, scope = self.model.graph, self.scopes[0]
        infos = (*graph.value_info, *graph.output, *graph.input)
        typed = [info for info in infos if info.type.tensor_type.elem_type]
        return {(id(scope), info.name): _named(info.type.tensor_type.elem_type) for info in typed}

    def _use(self, site: Site) -> Use:
        weight, problem = None, None
        try:
            weight = weight_of(site.scope, site.node, self.folder)
        except ArtifactError as error:
            problem = error.problem
        factors = [value for value in (self.input(site, 0), self.input(site, 1)) if value is not None]
        activation = next((value for value in factors if not self.is_constant(value)), None)
        movable = weight is not None and weight.codes is not None and not _any(weight.zero_point)
        return Use(site, weight, problem, activation, movable and self._is_only_dequantized(site))

    def _is_only_dequantized(self, site: Site) -> bool:
        """Whether nothing but DequantizeLinear reads the codes of a weight, as placement's passes require."""
        traced = (trace_constant(site.scope, site.node.input[index]) for index in weight_inputs(site.node))
        path = next(path for path, _, tensor in traced if tensor is not None)
        if not path:  # integers that a layer multiplies with as they are
            return False
        scope, reader = path[-1]
        pending = [Value(*scope.find(reader.input[0]))]
        while pending:
            value = pending.pop()
            if value.name in value.scope.results:
                return False
            for where, node in self._readers.get(value.key, []):
                first = Value(*where.find(node.input[0])).key == value.key
                if first and any(is_standard(node, op) for op in TURNS):
                    pending += [Value(where, made, node) for made in node.output]
                elif not first or not is_standard(node, "DequantizeLinear"):
                    return False
        return True


def _named(number: int) -> str | None:
    name = dtype_name(TensorProto(data_type=number)) if number in TensorProto.DataType.values() else "UNKNOWN"
    return None if name in ("UNKNOWN", "UNDEFINED") else name


def _any(array: npt.NDArray[Any] | None) -> bool:
    return array is not None and bool(array.any())
