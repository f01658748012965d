"""Moves codes to another integer type; values stay bit for bit.

A code is the same number in every signed type that holds it: INT2 -> INT4 -> INT8 loses nothing, and neither does the
way back where every code fits.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from slope_compile.placement.passes.graph import codes_of, constant, dequantizers, set_constant

_NUMPY = {"INT4": np.dtype(ml_dtypes.int4), "INT8": np.dtype(np.int8)}
_BITS = {"INT4": 4, "INT8": 8}


class SetContainers(ir.passes.InPlacePass):
    """Stores the codes of some weights, and their zero points, in other types.

    Args:
        containers: Weight name (without `.codes`) -> the type to store its codes in, `INT4` or `INT8`.
    """

    def __init__(self, containers: Mapping[str, str]) -> None:
        self._containers = dict(containers)

    def requires(self, model: ir.Model) -> None:
        """Every named weight is an initializer of integers that fit the type, and only DequantizeLinear uses it."""
        for name, container in self._containers.items():
            codes = codes_of(model, name)
            if container not in _NUMPY or not constant(codes).dtype.is_integer():
                held = constant(codes).dtype.name
                raise ir.passes.PreconditionError(f"the {held} codes of '{name}' cannot be stored as {container}")
            values = constant(codes).numpy().astype(np.int16)
            limit = 2 ** (_BITS[container] - 1)
            if values.size and not (-limit <= int(values.min()) and int(values.max()) < limit):
                span = f"[{int(values.min())}, {int(values.max())}]"
                raise ir.passes.PreconditionError(f"the codes of '{name}' span {span}, which {container} cannot hold")
            dequantizers(codes, name)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Store codes and zero points anew."""
        for name, container in self._containers.items():
            codes = codes_of(model, name)
            nodes = dequantizers(codes, name)
            _store(codes, container)
            for node in nodes:
                zero_point = node.inputs[2] if len(node.inputs) > 2 else None
                if zero_point is not None and constant(zero_point).dtype.name != container:
                    _store(zero_point, container)
        return ir.passes.PassResult(model, modified=bool(self._containers))

    def ensures(self, model: ir.Model) -> None:
        """Every named weight has its type."""
        for name, container in self._containers.items():
            if constant(codes_of(model, name)).dtype.name != container:
                raise ir.passes.PostconditionError(f"the codes of '{name}' are not {container}")


def _store(value: ir.Value, container: str) -> None:
    codes = constant(value).numpy().astype(np.int8).astype(_NUMPY[container])
    set_constant(value, ir.tensor(codes, dtype=ir.DataType[container], name=value.name))
