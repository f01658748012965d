"""slope-compile: from a PyTorch model to a verified TensorRT engine with 2:4-sparse, 2- to 4-bit weights.

    import slope_compile as sc

    sc.compress(model, bits=4, pattern="2:4")      # in place; returns what each layer got and why
    loss = task_loss + sc.penalty(model)           # strength included
    sc.codes(model)                                # {"layer1.0.conv1.weight": CodedTensor, ...}
    sc.export(model, example, "m.onnx")            # Q/DQ, the laws proved on the bytes, golden outputs beside it
    sc.build("m.onnx", target="a100", out="m.engine")
    sc.verify("m.onnx", model=model)
    sc.pack(model, "m.slope")                      # what is stored and sent, proved on the bytes; an ONNX file too
    sc.load("m.slope", model=plain)                # weights back, bit for bit; or read codes and tensors without torch

Names are loaded on first use: importing this package imports neither torch nor onnx nor tensorrt.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from slope_compile._version import __version__

if TYPE_CHECKING:
    from slope_compile.build.single import build
    from slope_compile.compression.api import codes, compress, penalty
    from slope_compile.compression.codes import CodedTensor
    from slope_compile.export.run import export
    from slope_compile.pack.single import load, pack
    from slope_compile.recipe import Recipe, load_recipe
    from slope_compile.verify.run import verify

_HOMES = {
    "CodedTensor": "slope_compile.compression.codes",
    "Recipe": "slope_compile.recipe",
    "codes": "slope_compile.compression.api",
    "compress": "slope_compile.compression.api",
    "load": "slope_compile.pack.single",
    "load_recipe": "slope_compile.recipe",
    "penalty": "slope_compile.compression.api",
}

_ROOMS = ("build", "export", "pack", "verify")

__all__ = [
    "CodedTensor", "Recipe", "__version__", "build", "codes", "compress", "export", "load", "load_recipe", "pack",
    "penalty", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"slope_compile.{name}")  # callable: see _surface.py
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'slope_compile' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)
