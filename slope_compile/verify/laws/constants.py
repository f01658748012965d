"""Floats that a file keeps under their trained names, biases and norms above all, are the trained ones, bit for bit.

Outputs do not tell this: a bias off by its last bit moves them less than rounding may.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from slope_compile.placement.rounding import rounded
from slope_compile.qdq.checks import float_bits
from slope_compile.qdq.floats import FLOATS, iter_floats
from slope_compile.qdq.tensors import dtype_name, load_graph, to_numpy

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]
_REWRITTEN = {"QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Constant", "ConstantOfShape", "Gemm", "MatMul",
              "Transpose", "Reshape"}  # operators that placing gives other attributes  # fmt: skip


@dataclass(frozen=True)
class Unequal:
    """What differs by its bits.

    Args:
        told: In words, the tensor or node named.
        diverges: Of a tensor: its layer, how it differs and its statistics, as a check's `diverges`.
    """

    told: str
    diverges: Mapping[str, Any] | None = None


class Comparison:
    """Tensors compared bit for bit, one after the other; of the first that differs it is said how."""

    def __init__(self, whose: str) -> None:
        self._whose, self._explained = whose, False

    def unequal(self, name: str, operator: str, expected: Array, found: Array) -> Iterator[Unequal]:
        """Yield how a tensor differs from what it should be, if it does.

        Args:
            name: `conv.bias`.
            operator: What reads it.
            expected: What it should be.
            found: What it is, of the same shape.
        """
        count = int(np.count_nonzero(float_bits(expected) != float_bits(found)))
        if not count:
            return
        told = f"{name}: {count} of {expected.size} values are not {self._whose}"
        yield Unequal(told, None if self._explained else _explained(name, operator, expected, found))
        self._explained = True


def _explained(name: str, operator: str, expected: Array, found: Array) -> dict[str, Any]:
    from slope_compile.verify.bisect.arrays import array_cause
    from slope_compile.verify.bisect.distance import relative_error, statistics
    from slope_compile.verify.bisect.explain import Divergence

    layer, _, role = name.rpartition(".")
    cause = f"{role}: {array_cause(expected, found) or 'the sign of 0'}"
    error = relative_error(expected, found)
    return Divergence(
        layer or name, operator, cause, error, 0.0, statistics(expected), statistics(found)
    ).figures()  # fmt: skip


def noted(found: Iterable[Unequal], figures: dict[str, Any]) -> list[str]:
    """Return what differs in words, and note the first tensor in a check's figures: outputs may not show it at all."""
    every = list(found)
    told = [one.told for one in every]
    for index, one in enumerate(every):
        if one.diverges is not None:
            told[index] += f" ({one.diverges['cause']})"
            figures.setdefault("diverges", one.diverges)
            break
    return told


def constant_problems(onnx: Path, model: nn.Module) -> Iterator[Unequal]:
    """Yield the float tensors of a file that have the name, the shape, and not the bits of a trained one.

    Args:
        onnx: The file.
        model: The folded model.
    """
    import torch

    trained = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    graph, compared = load_graph(onnx), Comparison("the trained ones")
    readers = _readers(graph)
    for stored in iter_floats(graph, onnx):
        known = trained.get(stored.name)
        if known is None or tuple(known.shape) != stored.values.shape or stored.values.dtype != np.float32:
            continue
        expected = known.detach().cpu().numpy()
        yield from compared.unequal(stored.name, readers.get(stored.name, ""), expected, stored.values)


def placed_problems(onnx: Path, placed: Path) -> Iterator[Unequal]:
    """Yield what a placed file changed though no placing does: floats that kept their names, attributes of operators.

    Args:
        onnx: The exported file.
        placed: What the build made of it.
    """
    before, after = load_graph(onnx), load_graph(placed)
    kept = {one.name: one for one in after.graph.initializer if dtype_name(one) in FLOATS}
    readers, compared = _readers(after), Comparison("the exported ones")
    for stored in iter_floats(before, onnx):
        name, tensor = stored.name, kept.get(stored.name)
        if tensor is None or tuple(tensor.dims) != stored.values.shape or stored.values.dtype != np.float32:
            continue
        kind = dtype_name(tensor)
        expected = rounded(stored.values, kind) if kind in ("FLOAT16", "BFLOAT16") else stored.values
        found = to_numpy(tensor, placed, name)
        yield from compared.unequal(name, readers.get(name, ""), expected, found)
    operators = {node.name: node for node in before.graph.node if node.name and node.op_type not in _REWRITTEN}
    for node in after.graph.node:
        old = operators.get(node.name)
        if old is not None and old.op_type == node.op_type and _attributes(old) != _attributes(node):
            yield Unequal(f"{node.name} ({node.op_type}): its attributes are not the exported ones")


def _readers(model: ModelProto) -> dict[str, str]:
    """Return the operator that reads each value first."""
    return {name: node.op_type for node in reversed(model.graph.node) for name in node.input}


def _attributes(node: NodeProto) -> dict[str, bytes]:
    return {one.name: one.SerializeToString(deterministic=True) for one in node.attribute if not one.HasField("g")}
