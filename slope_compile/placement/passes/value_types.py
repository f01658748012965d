"""Element types that a file does not tell, by the type variables of ONNX's schemas.

onnx.shape_inference would find them too, but it is native code, and files of other tools have crashed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir

from slope_compile.placement.passes.slots import find_schema, formal

# What an attribute says of an operator's output, where no input binds its type: attribute, default
_SAID = {
    "Cast": ("to", None),
    "QuantizeLinear": ("output_dtype", ir.DataType.UINT8),
    "LayerNormalization": ("stash_type", ir.DataType.FLOAT),
    "RandomNormal": ("dtype", ir.DataType.FLOAT),
    "RandomUniform": ("dtype", ir.DataType.FLOAT),
    "ConstantOfShape": ("value", ir.DataType.FLOAT),
}


def infer_types(graph: ir.Graph, opset: int) -> None:
    """Give the values of a graph the types that follow from those of its inputs; others stay unknown.

    Args:
        graph: In topological order.
        opset: The model's.
    """
    for node in graph:
        schema = find_schema(node, opset)
        unknown = [(index, value) for index, value in enumerate(node.outputs) if value.dtype is None and value.name]
        if schema is None or not unknown:
            continue
        bound = {one.type_param_str: only for one in schema.type_constraints if (only := _only(one.allowed_type_strs))}
        for index, source in enumerate(node.inputs):
            if source is not None and source.dtype is not None:
                bound[formal(schema.inputs, index)] = source.dtype
        for index, value in unknown:
            variable = formal(schema.outputs, index)
            found = _only([variable]) or bound.get(variable) or _said(node)
            if found is not None:
                value.type = ir.TensorType(found)


def _only(allowed: Sequence[str]) -> ir.DataType | None:
    """Return the one type that a list such as ["tensor(int64)"] allows."""
    name = allowed[0].removeprefix("tensor(").removesuffix(")").upper() if len(allowed) == 1 else ""
    return ir.DataType[name] if name in ir.DataType.__members__ else None


def _said(node: ir.Node) -> ir.DataType | None:
    """Return the type that an attribute says."""
    name, default = _SAID.get(node.op_type, (None, None))
    attribute = None if name is None else node.attributes.get(name)
    if attribute is None:
        return default
    if attribute.type == ir.AttributeType.TENSOR:
        return attribute.as_tensor().dtype
    known = attribute.type == ir.AttributeType.INT and attribute.as_int() in onnx.TensorProto.DataType.values()
    return ir.DataType(attribute.as_int()) if known else None
