"""Floats that a file keeps under their trained names, biases and norms above all, are the trained ones, bit for bit.

Outputs do not tell this: a bias off by its last bit moves them less than rounding may.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnx import NodeProto

from slope_compile.placement.rounding import rounded
from slope_compile.qdq.checks import float_bits
from slope_compile.qdq.floats import FLOATS, iter_floats
from slope_compile.qdq.tensors import dtype_name, load_graph, to_numpy

if TYPE_CHECKING:
    from torch import nn

_REWRITTEN = {"QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Constant", "ConstantOfShape", "Gemm", "MatMul",
              "Transpose", "Reshape"}  # operators that placing gives other attributes  # fmt: skip


def constant_problems(onnx: Path, model: nn.Module) -> Iterator[str]:
    """Yield the float tensors of a file that have the name, the shape, and not the bits of a trained one.

    Args:
        onnx: The file.
        model: The folded model.
    """
    import torch

    trained = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    for stored in iter_floats(load_graph(onnx), onnx):
        known = trained.get(stored.name)
        if known is None or tuple(known.shape) != stored.values.shape or stored.values.dtype != np.float32:
            continue
        expected = known.detach().cpu().numpy()
        unequal = np.count_nonzero(float_bits(expected) != float_bits(stored.values))
        if unequal:
            yield f"{stored.name}: {unequal} of {expected.size} values are not the trained ones"


def placed_problems(onnx: Path, placed: Path) -> Iterator[str]:
    """Yield what a placed file changed though no placing does: floats that kept their names, attributes of operators.

    Args:
        onnx: The exported file.
        placed: What the build made of it.
    """
    before, after = load_graph(onnx), load_graph(placed)
    kept = {one.name: one for one in after.graph.initializer if dtype_name(one) in FLOATS}
    for stored in iter_floats(before, onnx):
        tensor = kept.get(stored.name)
        if tensor is None or tuple(tensor.dims) != stored.values.shape or stored.values.dtype != np.float32:
            continue
        kind = dtype_name(tensor)
        expected = rounded(stored.values, kind) if kind in ("FLOAT16", "BFLOAT16") else stored.values
        found = to_numpy(tensor, placed, stored.name)
        unequal = np.count_nonzero(float_bits(expected) != float_bits(found))
        if unequal:
            yield f"{stored.name}: {unequal} of {found.size} values are not the exported ones"
    operators = {node.name: node for node in before.graph.node if node.name and node.op_type not in _REWRITTEN}
    for node in after.graph.node:
        old = operators.get(node.name)
        if old is not None and old.op_type == node.op_type and _attributes(old) != _attributes(node):
            yield f"{node.name} ({node.op_type}): its attributes are not the exported ones"


def _attributes(node: NodeProto) -> dict[str, bytes]:
    return {one.name: one.SerializeToString(deterministic=True) for one in node.attribute if not one.HasField("g")}
