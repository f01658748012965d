"""Weights of an onnx-ir graph: their codes, what dequantizes them, what multiplies with them."""

from __future__ import annotations

import onnx_ir as ir

from slope_compile.qdq.graph import MULTIPLIES, TURNS

_CASTS = ("Cast", "CastLike")


def codes_of(model: ir.Model, name: str) -> ir.Value:
    """Return the initializer of a weight: NAME.codes of our exports, NAME in files of other tools.

    Raises:
        PreconditionError: If there is none.
    """
    for graph in model.graphs():
        for candidate in (f"{name}.codes", name):
            if candidate in graph.initializers:
                return graph.initializers[candidate]
    raise ir.passes.PreconditionError(f"the model has no initializer '{name}.codes' or '{name}'")


def constant(value: ir.Value) -> ir.TensorProtocol:
    """Return what a value holds.

    Raises:
        PreconditionError: If the graph computes it.
    """
    if value.const_value is None:
        raise ir.passes.PreconditionError(f"'{value.name}' is no constant")
    return value.const_value


def set_constant(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Replace what an initializer holds, its type and shape with it."""
    value.const_value = tensor
    value.type = ir.TensorType(tensor.dtype)
    value.shape = ir.Shape(tensor.numpy().shape)


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Register a new initializer, under a name that is free."""
    taken = set(graph.initializers) | {value.name for node in graph for value in node.outputs}
    free = next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
    value = ir.Value(name=free, const_value=tensor)
    set_constant(value, tensor)
    graph.register_initializer(value)
    return value


def dequantizers(codes: ir.Value, name: str) -> list[ir.Node]:
    """Return the DequantizeLinear nodes that read codes, straight or turned by Transpose, Reshape or Identity.

    Raises:
        PreconditionError: If anything else reads them.
    """
    found: list[ir.Node] = []
    pending = [codes]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            raise ir.passes.PreconditionError(f"the codes of '{name}' are an output of the model")
        for node, index in value.uses():
            if node.op_type == "DequantizeLinear" and index == 0:
                found.append(node)
            elif node.op_type in TURNS and index == 0:
                pending.extend(node.outputs)
            else:
                raise ir.passes.PreconditionError(f"the codes of '{name}' are used by {node.op_type}")
    if not found:
        raise ir.passes.PreconditionError(f"nothing dequantizes '{name}'")
    return found


def multipliers(value: ir.Value, name: str) -> list[tuple[ir.Node, int]]:
    """Return the Conv, MatMul and Gemm nodes that multiply with a value, with the input they read it by.

    Raises:
        PreconditionError: If anything else reads it, Transpose, Identity and Cast aside.
    """
    found: list[tuple[ir.Node, int]] = []
    pending = [value]
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type in MULTIPLIES and index < 2:
                found.append((node, index))
            elif node.op_type in ("Transpose", "Identity", *_CASTS) and index == 0:
                pending.extend(node.outputs)
            else:
                raise ir.passes.PreconditionError(f"the weight '{name}' is used by {node.op_type}")
    return found
