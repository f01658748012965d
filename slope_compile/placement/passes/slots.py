"""Which inputs and outputs of an ONNX operator can be FLOAT16 or BFLOAT16, by the type constraints of its schema."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

FLOAT = ir.DataType.FLOAT
_NAMES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}
BFLOAT16_OPSET = 22  # Conv, the pools and most activations take BFLOAT16 since then


@dataclass(frozen=True)
class Slots:
    """Which float32 tensors of a node change their type with it.

    Args:
        inputs: One flag an input.
        outputs: One flag an output.
    """

    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]


def slots(node: ir.Node, opset: int, half: ir.DataType) -> Slots | None:
    """Return what becomes half when a node does; None where nothing of it can, or the type of a tensor is not known.

    An input follows its type variable (`T`); one whose type the schema fixes stays float32 (the scales of Resize), and
    so does an output that no float input binds (the mean of LayerNormalization).

    Args:
        node: A node whose values have their types.
        opset: The model's.
        half: FLOAT16 or BFLOAT16.
    """
    schema = find_schema(node, opset)
    tensors = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    if schema is None or any(value.dtype is None for value in tensors):
        return None
    allows = {one.type_param_str: _NAMES[half] in one.allowed_type_strs for one in schema.type_constraints}
    inputs, bound = [], set()
    for index, value in enumerate(node.inputs):
        variable = formal(schema.inputs, index)
        changes = value is not None and value.dtype == FLOAT and allows.get(variable, False)
        inputs.append(changes)
        if changes:
            bound.add(variable)
    outputs = [value.dtype == FLOAT and formal(schema.outputs, i) in bound for i, value in enumerate(node.outputs)]
    return Slots(tuple(inputs), tuple(outputs)) if bound else None


def find_schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    """Return a standard operator's schema, None for other domains and unknown names."""
    if node.domain not in ("", "ai.onnx"):
        return None
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def formal(parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Return the type variable, or the type, of a schema's parameter; the last one may stand for many."""
    return str(parameters[min(index, len(parameters) - 1)].type_str) if parameters else ""


def admit_bfloat16(model: ir.Model) -> None:
    """Raise the opset to 22 where all that changes for the model's operators is the types that they take.

    Before 22 no convolution takes BFLOAT16.
    """
    opset = model.opset_imports.get("", 0)
    if opset >= BFLOAT16_OPSET:
        return
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            continue
        rounds_up = node.attributes.get_int("ceil_mode", 0)  # 22 says more about windows that begin in the padding
        if rounds_up or _signature(node, opset) != _signature(node, BFLOAT16_OPSET):
            return
    model.opset_imports[""] = BFLOAT16_OPSET


def _signature(node: ir.Node, opset: int) -> tuple[object, ...] | None:
    schema = find_schema(node, opset)
    if schema is None:
        return None
    parameters = [(one.name, str(one.option)) for one in (*schema.inputs, *schema.outputs)]
    attributes = sorted((name, one.required, str(one.default_value)) for name, one in schema.attributes.items())
    return parameters, attributes
