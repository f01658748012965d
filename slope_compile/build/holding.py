"""Which constant of the engine holds which weight of the ONNX file, and whether in the declared type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from slope_compile.build.layers import Constant, EngineLayer

# The container in the ONNX file -> what the engine calls it when it keeps it
HELD_AS = {"INT4": "Int4", "INT8": "Int8", "FLOAT": "Float", "FLOAT16": "Half", "BFLOAT16": "BFloat16"}
# What may stand between a weight's initializer and the operator that multiplies with it
PASSES_THROUGH = ("DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity")
# TensorRT pads an axis to what its kernels take, such as 3 outputs to 4; the widest tile is 32
MAX_PADDING = 31


@dataclass(frozen=True)
class Wanted:
    """A weight of the ONNX file that the engine should hold.

    Args:
        initializer: Name of the tensor in the file (the codes', where the weight is coded).
        shape: As stored.
        dtype: The declared container: `INT4`, `INT8`, `FLOAT`, …
        nodes: Names of the nodes from the initializer to the operator, the operator's last.
    """

    initializer: str
    shape: tuple[int, ...]
    dtype: str
    nodes: tuple[str, ...]

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Held:
    """What the engine has for one weight.

    Args:
        layer: The layer whose constant it is, None where no constant was found.
        constant: That constant.
        compute: The layer in which the weight's operator ended up, None where the list does not name it.
        declared: Whether the constant has the declared type.
        note: What is to be said: another type, padding, nothing found.
    """

    layer: EngineLayer | None
    constant: Constant | None
    compute: EngineLayer | None
    declared: bool
    note: str | None


def node_names(graph: onnx.GraphProto, initializer: str) -> tuple[str, ...]:
    """Return the names of the nodes from an initializer to its operator, as TensorRT's parser names them.

    Args:
        graph: The main graph.
        initializer: The tensor to start at.
    """
    names: list[str] = []
    value = initializer
    for node in graph.node:  # the nodes of a valid graph are in topological order
        if value in node.input:
            names.append(node.name or f"node_of_{node.output[0]}")
            if node.op_type not in PASSES_THROUGH:
                break
            value = node.output[0]
    return tuple(names)


def find_held(wanted: Sequence[Wanted], layers: Sequence[EngineLayer]) -> list[Held]:
    """Return what the engine holds for each weight, in order.

    A constant belongs to the weight whose initializer it is named after; else to a weight with as many elements whose
    nodes went into its layer, one of the declared type first; else to one that fits but for padding. No constant is
    given twice.

    Args:
        wanted: The weights of the ONNX file.
        layers: The engine's layers.
    """
    free = [(layer, constant) for layer in layers for constant in layer.constants]
    found: dict[int, tuple[EngineLayer, Constant]] = {}

    def named(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
        called = constant.name == want.initializer or constant.name.startswith(f"{want.initializer}_")
        return called and (constant.elements == want.elements or _is_padded(want.shape, constant.shape))

    def related(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
        return constant.elements == want.elements and not set(want.nodes).isdisjoint(layer.onnx)

    def declared(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
        return related(want, layer, constant) and constant.dtype == HELD_AS.get(want.dtype)

    def padded(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
        return _is_padded(want.shape, constant.shape) and not set(want.nodes).isdisjoint(layer.onnx)

    for fits in (named, declared, related, padded):
        for index, want in enumerate(wanted):
            if index in found:
                continue
            match = next((pair for pair in free if fits(want, *pair)), None)
            if match is not None:
                found[index] = match
                free.remove(match)
    return [_held(want, found.get(index), layers) for index, want in enumerate(wanted)]


def _held(want: Wanted, found: tuple[EngineLayer, Constant] | None, layers: Sequence[EngineLayer]) -> Held:
    with_operator = [layer for layer in layers if want.nodes and want.nodes[-1] in layer.onnx]
    if found is None:
        compute = with_operator[0] if with_operator else None
        note = f"declared {want.dtype}; the engine's layer list shows no constant of {want.elements} elements for it"
        return Held(None, None, compute, False, note)
    layer, constant = found
    fed = [other for other in with_operator if not set(layer.outputs).isdisjoint(other.inputs)]
    compute = layer if layer in with_operator else next(iter(fed or with_operator), None)
    declared = constant.dtype == HELD_AS.get(want.dtype)
    notes = [] if declared else [f"declared {want.dtype}, engine holds {constant.dtype}"]
    if constant.elements > want.elements:
        notes.append(f"padded from {want.elements} elements to {constant.elements}")
    return Held(layer, constant, compute, declared, "; ".join(notes) or None)


def _is_padded(shape: tuple[int, ...], held: tuple[int, ...]) -> bool:
    """Return whether `held`, whose axes may be in another order, is `shape` with some axes a little longer."""
    if len(shape) != len(held) or len(shape) < 2:
        return False
    return all(0 <= have - want <= MAX_PADDING for want, have in zip(sorted(shape), sorted(held), strict=True))
