"""The steps from a float ONNX graph to the file, each with what must hold before it and after it.

hold (weights become inputs) -> optimize -> quantize (codes, scale, DequantizeLinear) -> clean -> write (and read back)
"""

from __future__ import annotations

import onnx_ir as ir


def run_pass(step: ir.passes.InPlacePass, model: ir.Model) -> None:
    """Run one pass on a model in place; a broken condition surfaces as the error that found it."""
    try:
        step(model)
    except ir.passes.InvariantError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None
