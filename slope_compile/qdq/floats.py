"""The float tensors of an ONNX file, and what is certainly a parameter among them: a weight, a bias, a norm's numbers.

A parameter must be finite, and a batch norm's variance not negative. Any other constant may be infinite where it is a
mask or a bound, that is, holds nothing but 0 and infinities (an attention mask, the end of a Clip); NaN is in none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto

from slope_compile.qdq.checks import Finding, count_where
from slope_compile.qdq.graph import MULTIPLIES, Scope, is_standard, scopes
from slope_compile.qdq.reader import trace_constant, weight_inputs
from slope_compile.qdq.tensors import dtype_name, to_numpy

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
_PARAMETERS = {  # inputs that are trained
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "PRelu": (1,),
    "BatchNormalization": (1, 2, 3, 4), "LayerNormalization": (1, 2), "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2), "RMSNormalization": (1,), "LSTM": (1, 2, 3), "GRU": (1, 2, 3), "RNN": (1, 2, 3),
}  # fmt: skip
_VARIANCE = 4  # of a BatchNormalization


class StoredFloats(NamedTuple):
    """A float tensor of a file.

    Attributes:
        name: In the file.
        values: float32 (float64 where that is stored).
        parameter: Whether an operator takes it as something that is trained.
        variance: Whether a batch norm takes it as its variance.
    """

    name: str
    values: npt.NDArray[Any]
    parameter: bool
    variance: bool


def iter_floats(model: ModelProto, place: Path | None) -> Iterator[StoredFloats]:
    """Yield every float initializer and constant of a model, those of subgraphs too, one in memory at a time.

    Args:
        model: As `load_graph` returns it.
        place: Its file.

    Raises:
        ArtifactError: If a tensor is cut off or malformed.
    """
    every = list(scopes(model))
    roles = _roles(every)
    seen: set[int] = set()
    for scope in every:
        for name, tensor in scope.constants():
            if id(tensor) in seen or dtype_name(tensor) not in FLOATS:
                continue
            seen.add(id(tensor))
            role = roles.get(id(tensor), set())
            yield StoredFloats(
                name, to_numpy(tensor, place, name), bool(role), ("BatchNormalization", _VARIANCE) in role
            )


def check_floats(name: str, values: npt.NDArray[Any], parameter: bool, variance: bool) -> list[Finding]:
    """Return what a float tensor has that it must not: NaN, infinities, a negative variance.

    Args:
        name: Of the tensor.
        values: Its numbers.
        parameter: Whether it is trained.
        variance: Whether it is a variance.
    """
    with np.errstate(all="ignore"):
        count, first = count_where(lambda block: ~np.isfinite(block), values)
        if count and (parameter or not _is_mask(values)):
            return [Finding(name, "finite", f"{count} of {values.size} are NaN or infinite, the first at {first}")]
        negative, first = count_where(lambda block: block < 0, values) if variance else (0, [])
    if negative:
        return [Finding(name, "variance", f"{negative} of {values.size} are below 0, the first at {first}")]
    return []


def _is_mask(values: npt.NDArray[Any]) -> bool:
    """Return whether there is nothing but 0 and infinities; NaN is neither."""
    return not count_where(lambda block: ~((block == 0) | np.isinf(block)), values)[0]


def _roles(every: list[Scope]) -> dict[int, set[tuple[str, int]]]:
    """Return, by the tensor's id, which inputs of which operators it is: those that are trained."""
    roles: dict[int, set[tuple[str, int]]] = {}
    for scope in every:
        for node in scope.nodes:
            for index in _trained_inputs(scope, node):
                if index < len(node.input) and node.input[index]:
                    _, _, tensor = trace_constant(scope, node.input[index])
                    if tensor is not None:
                        roles.setdefault(id(tensor), set()).add((node.op_type, index))
    return roles


def _trained_inputs(scope: Scope, node: NodeProto) -> tuple[int, ...]:
    if not is_standard(node, node.op_type):
        return ()
    if node.op_type == "Add" and len(node.input) == 2:  # a bias, where the other term is a product with a weight
        return tuple(1 - index for index, name in enumerate(node.input) if _is_product(scope, name))
    return _PARAMETERS.get(node.op_type, ())


def _is_product(scope: Scope, name: str) -> bool:
    where, _, source = scope.find(name)
    if source is None or isinstance(source, TensorProto) or not any(is_standard(source, op) for op in MULTIPLIES):
        return False
    return any(trace_constant(where, source.input[index])[2] is not None for index in weight_inputs(source))
