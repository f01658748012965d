"""Moves codes to a wider integer type, for backends that cannot take the narrow one; values stay bit for bit.

A b-bit code is the same number in every signed type of at least b bits, so INT4 -> INT8 and INT2 -> INT4 lose nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

_WIDER: dict[str, tuple[str, ...]] = {"INT2": ("INT4", "INT8"), "INT4": ("INT8",), "INT8": ()}
_NUMPY = {"INT4": np.dtype(ml_dtypes.int4), "INT8": np.dtype(np.int8)}


class WidenCodes(ir.passes.InPlacePass):
    """Stores the codes of some weights in wider types.

    A matrix in INT8 whose blocks all repeat their row's scale gets that one scale per row: TensorRT takes block scales
    with INT4 only.

    Args:
        containers: Weight name (without `.codes`) -> the type to store its codes in, `INT4` or `INT8`.
    """

    def __init__(self, containers: Mapping[str, str]) -> None:
        self._containers = dict(containers)

    def requires(self, model: ir.Model) -> None:
        """Every named weight is an initializer of a narrower signed type that only DequantizeLinear uses."""
        values = _initializers(model)
        for name, wide in self._containers.items():
            if name not in values:
                raise ir.passes.PreconditionError(f"the model has no initializer '{name}.codes'")
            narrow = _tensor(values[name]).dtype.name
            if wide not in _WIDER.get(narrow, ()):
                raise ir.passes.PreconditionError(f"the {narrow} codes of '{name}' cannot be widened to {wide}")
            users = {use.node.op_type for use in values[name].uses()} - {"DequantizeLinear"}
            if users:
                raise ir.passes.PreconditionError(f"the codes of '{name}' are used by {', '.join(sorted(users))}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen codes and zero points, then mend the scales of their DequantizeLinear nodes."""
        values = _initializers(model)
        for name, wide in self._containers.items():
            value = values[name]
            _widen(value, wide)
            for node in {use.node for use in value.uses()}:
                zero_point = node.inputs[2] if len(node.inputs) > 2 else None
                if zero_point is not None and _tensor(zero_point).dtype.name != wide:
                    _widen(zero_point, wide)
                if wide == "INT8" and zero_point is None:
                    _unblock(node)
        return ir.passes.PassResult(model, modified=bool(self._containers))

    def ensures(self, model: ir.Model) -> None:
        """Every named weight has its type."""
        values = _initializers(model)
        for name, wide in self._containers.items():
            if _tensor(values[name]).dtype.name != wide:
                raise ir.passes.PostconditionError(f"the codes of '{name}' are not {wide}")


def _initializers(model: ir.Model) -> dict[str, ir.Value]:
    return {name.removesuffix(".codes"): v for graph in model.graphs() for name, v in graph.initializers.items()}


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    if value.const_value is None:
        raise ir.passes.PreconditionError(f"'{value.name}' is no constant")
    return value.const_value


def _widen(value: ir.Value, dtype: str) -> None:
    codes = _tensor(value).numpy().astype(np.int8).astype(_NUMPY[dtype])
    value.const_value = ir.tensor(codes, dtype=ir.DataType[dtype], name=value.name)
    value.type = ir.TensorType(ir.DataType[dtype])


def _unblock(node: ir.Node) -> None:
    """Give a blocked DequantizeLinear of a matrix one scale per row, where all blocks of a row have the same."""
    scale = node.inputs[1]
    if scale is None or not node.attributes.get_int("block_size", 0) or len(scale.uses()) != 1:
        return
    axis = node.attributes.get_int("axis", 1)
    blocks = _tensor(scale).numpy()
    rows = np.moveaxis(blocks, axis, -1)
    if blocks.ndim != 2 or not np.all(rows == rows[:, :1]):
        return
    scale.const_value = ir.tensor(np.ascontiguousarray(rows[:, 0]), name=scale.name)
    scale.shape = ir.Shape([len(rows)])
    del node.attributes["block_size"]
    node.attributes["axis"] = ir.AttrInt64("axis", (axis + 1) % 2)
