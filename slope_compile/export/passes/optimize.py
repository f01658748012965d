"""Constant folding and clean-up by onnxscript, with the weights held out of its reach."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import optimizer


class Optimize(ir.passes.InPlacePass):
    """Folds the shape arithmetic that torch.export leaves, inlines functions, drops what nothing uses.

    Args:
        opset: The operator set that was asked for; folding must not change it.
    """

    def __init__(self, opset: int) -> None:
        self._opset = opset

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Run onnxscript's optimizer in place."""
        optimizer.optimize_ir(model)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """The operator set is the one asked for, and no local functions are left."""
        if model.opset_imports.get("") != self._opset or model.functions:
            raise ir.passes.PostconditionError(f"opsets {model.opset_imports}, {len(model.functions)} functions")
