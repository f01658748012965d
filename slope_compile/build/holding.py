"""Which constant of the engine holds which weight of the ONNX file, and whether in the declared type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx

from slope_compile.build.layers import COUNTED, Constant, EngineLayer

# The container in the ONNX file -> what the engine calls it when it keeps it
HELD_AS = {"INT4": "Int4", "INT8": "Int8", "FLOAT": "Float", "FLOAT16": "Half", "BFLOAT16": "BFloat16"}
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
# What may stand between a weight's initializer and the operator that multiplies with it
PASSES_THROUGH = ("DequantizeLinear", "Cast", "Transpose", "Reshape", "Identity")
# TensorRT pads an axis to what its kernels take, such as 3 outputs to 4; the widest tile is 32
MAX_PADDING = 31
TILES = (1, 4, 8, 16, 32)
# Layers (a reformat, a move) that may stand between one that dequantizes and the one that multiplies
MOST_STEPS = 3
TOGETHER, PADDED = "one constant together with", "padded from"  # in a note: the constant is larger than the weight


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
        constant: That constant; its share, where one constant holds several weights.
        compute: The layer in which the weight's operator ended up, None where the list does not name it.
        declared: Whether the constant has the declared type.
        note: What is to be said: another type, padding, company, nothing found.
        fused: Whether the layer that holds the constant computes the operator too; None where either is unknown.
        fused_with: The other ONNX nodes that ended up in the computing layer.
    """

    layer: EngineLayer | None
    constant: Constant | None
    compute: EngineLayer | None
    declared: bool
    note: str | None
    fused: bool | None = None
    fused_with: tuple[str, ...] = ()


Pair = tuple[EngineLayer, Constant]
Found = tuple[EngineLayer, Constant, tuple[str, ...]]  # and the weights that share the constant, if several do
Given = dict[str, Found]  # by the weight's initializer


def path_from(graph: onnx.GraphProto, initializer: str) -> list[onnx.NodeProto]:
    """Return the nodes from an initializer to its operator, the operator last.

    Args:
        graph: The main graph.
        initializer: The tensor to start at.
    """
    path: list[onnx.NodeProto] = []
    value = initializer
    for node in graph.node:  # the nodes of a valid graph are in topological order
        if value in node.input:
            path.append(node)
            if node.op_type not in PASSES_THROUGH:
                break
            value = node.output[0]
    return path


def node_names(graph: onnx.GraphProto, initializer: str) -> tuple[str, ...]:
    """Return the names of the nodes from an initializer to its operator, as TensorRT's parser names them.

    Args:
        graph: The main graph.
        initializer: The tensor to start at.
    """
    return tuple(node.name or f"node_of_{node.output[0]}" for node in path_from(graph, initializer))


def declared_type(graph: onnx.GraphProto, initializer: str, stored: str) -> str:
    """Return the type that a weight declares: the stored one, or what floats are cast to before they are multiplied.

    Args:
        graph: The main graph.
        initializer: The tensor to start at.
        stored: Its element type.
    """
    path = path_from(graph, initializer)
    if stored not in FLOATS or any(node.op_type == "DequantizeLinear" for node in path):
        return stored
    casts = [node for node in path if node.op_type == "Cast"]
    types = [attribute.i for node in casts for attribute in node.attribute if attribute.name == "to"]
    return onnx.TensorProto.DataType.Name(types[-1]) if types else stored


def find_held(wanted: Sequence[Wanted], layers: Sequence[EngineLayer]) -> list[Held]:
    """Return what the engine holds for each weight, in order.

    A constant belongs to the weight whose initializer it is named after; else to a weight with as many elements whose
    nodes went into its layer, one of the declared type first; else to all weights of its layer together, where it has
    as many elements as they; else to one that fits but for padding. No constant is given twice.

    Args:
        wanted: The weights of the ONNX file; one initializer may be wanted by several.
        layers: The engine's layers.
    """
    free = [(layer, constant) for layer in layers for constant in layer.constants]
    found: Given = {}
    distinct = {want.initializer: want for want in wanted}
    for give in (_alone(_named), _alone(_declared), _alone(_related), _together, _alone(_padded)):
        found |= give([want for name, want in distinct.items() if name not in found], free)
    return [_held(want, found.get(want.initializer), layers) for want in wanted]


def _alone(fits: Callable[[Wanted, EngineLayer, Constant], bool]) -> Callable[[list[Wanted], list[Pair]], Given]:
    """Return what takes, for each weight, the first free constant that fits it."""

    def give(missing: list[Wanted], free: list[Pair]) -> Given:
        found: Given = {}
        for want in missing:
            match = next((pair for pair in free if fits(want, *pair)), None)
            if match is not None:
                found[want.initializer] = *match, ()
                free.remove(match)
        return found

    return give


def _together(missing: list[Wanted], free: list[Pair]) -> Given:
    """Take constants that several weights share: operators that read one input may become one (`a || b`)."""
    found: Given = {}
    for pair in list(free):
        layer, constant = pair
        group = [want for want in missing if want.initializer not in found and _went_into(want, layer)]
        same_type = len({want.dtype for want in group}) == 1
        if len(group) > 1 and same_type and sum(want.elements for want in group) == constant.elements:
            names = tuple(want.initializer for want in group)
            found |= {want.initializer: (layer, constant, names) for want in group}
            free.remove(pair)
    return found


def _named(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
    called = constant.name == want.initializer or constant.name.startswith(f"{want.initializer}_")
    return called and (constant.elements == want.elements or _is_padded(want.shape, constant))


def _related(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
    # A row of as many numbers as a matrix has is something else: a bias, the scales of a product.
    row = len(constant.shape) > 1 and _axes(constant.shape) < 2 <= _axes(want.shape)
    return constant.elements == want.elements and not row and _went_into(want, layer)


def _declared(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
    return constant.dtype == HELD_AS.get(want.dtype) and _related(want, layer, constant)


def _padded(want: Wanted, layer: EngineLayer, constant: Constant) -> bool:
    return _went_into(want, layer) and _is_padded(want.shape, constant)


def _went_into(want: Wanted, layer: EngineLayer) -> bool:
    return not set(want.nodes).isdisjoint(layer.onnx)


def _axes(shape: tuple[int, ...]) -> int:
    return sum(extent > 1 for extent in shape)


def _held(want: Wanted, found: Found | None, layers: Sequence[EngineLayer]) -> Held:
    if found is None:
        note = f"declared {want.dtype}; the engine's layer list shows no constant of {want.elements} elements for it"
        return Held(None, None, next(iter(_with_operator(want, layers)), None), False, note)
    layer, constant, together = found
    notes = []
    if together:
        others = ", ".join(name for name in together if name != want.initializer)
        notes.append(f"{TOGETHER} {others}")
        constant = Constant(constant.name, want.shape, constant.dtype)
    if constant.elements > want.elements:
        notes.append(f"{PADDED} {want.elements} elements to {constant.elements}")
    declared = constant.dtype == HELD_AS.get(want.dtype)
    if not declared:
        notes.insert(0, f"declared {want.dtype}, engine holds {constant.dtype}")
    compute = _compute(want, layer, layers)
    return Held(
        layer,
        constant,
        compute,
        declared,
        "; ".join(notes) or None,
        fused=None if compute is None else compute == layer,
        fused_with=() if compute is None else tuple(name for name in compute.onnx if name not in want.nodes),
    )


def _with_operator(want: Wanted, layers: Sequence[EngineLayer]) -> list[EngineLayer]:
    return [layer for layer in layers if want.nodes and want.nodes[-1] in layer.onnx]


def _compute(want: Wanted, holder: EngineLayer, layers: Sequence[EngineLayer]) -> EngineLayer | None:
    """Return the layer that multiplies with a constant: the holder itself, or where its output goes."""
    if holder in (candidates := _with_operator(want, layers)):
        if holder.input_types:
            return holder
        candidates.remove(holder)  # what reads no tensor only prepares the constant
    values = set(holder.outputs)
    for _ in range(MOST_STEPS):
        if fed := [layer for layer in candidates if not values.isdisjoint(layer.inputs)]:
            return fed[0]
        values |= {name for layer in layers if not values.isdisjoint(layer.inputs) for name in layer.outputs}
    return candidates[0] if candidates else None


def _is_padded(shape: tuple[int, ...], constant: Constant) -> bool:
    """Return whether a constant, whose axes may be in another order, has the shape with some axes a little longer."""
    held = constant.shape
    if len(shape) == len(held) > 1:
        return all(0 <= have - want <= MAX_PADDING for want, have in zip(sorted(shape), sorted(held), strict=True))
    if constant.name != COUNTED or len(shape) < 2:
        return False
    # Only a count is known: output and input channels are what is padded.
    channels, rest = divmod(constant.elements, math.prod(shape[2:]) or 1)
    k, c = ({-(-extent // tile) * tile for tile in TILES} for extent in shape[:2])
    return not rest and any(channels == a * b for a in k for b in c)
