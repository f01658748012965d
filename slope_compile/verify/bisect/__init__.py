"""Where two implementations of one network first differ, how far each layer is off, and a reproducer of one layer.

layer_errors(OnnxSide(a), OnnxSide(b), feed, allowed)                   # rows of a heat map
explain("parity.onnx", TorchSide(model), OnnxSide(path), feed, allowed, out)  # after a check failed
"""

from __future__ import annotations

from slope_compile.verify.bisect.engine import engine_command, engine_note
from slope_compile.verify.bisect.explain import Divergence, explain
from slope_compile.verify.bisect.layers import LayerError, layer_errors
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.points import Side
from slope_compile.verify.bisect.torch_side import TorchSide

__all__ = [
    "Divergence",
    "LayerError",
    "OnnxSide",
    "Side",
    "TorchSide",
    "engine_command",
    "engine_note",
    "explain",
    "layer_errors",
]
