"""Constants in half precision: which fit, which may be clamped without a change of meaning, which forbid it.

Letters: M - the type's largest number (65504 in FLOAT16), m - its smallest normal one (6.1e-5).

| constant | becomes |
|---|---|
| every abs(v) <= M | rounded to the nearest |
| beyond M, a bound of Clip, Min or Max | ±M: no half value lies beyond it, so the bound still bounds nothing |
| below -M, and all that it is added to goes into Softmax | -M / 2: exp of it is 0 as before |
| beyond M otherwise | the operator stays float32 |
| not 0, and the largest abs(v) < m: an epsilon | the operator stays float32: it would be rounded to few bits, or to 0 |
| a divisor with some 0 < abs(v) < m | the operator stays float32: a quotient of it would be infinite |

A mask of -M / 2 stays finite with a score added to it: a whole row of -inf would come out of Softmax as NaN.
Small numbers beside large ones (weights) are rounded as all others are: what they lose is as small as what those lose.
Infinities and NaN of the file stay what they are.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
_BOUNDS = ("Clip", "Min", "Max")
_MASKS = ("Add", "Where", "Mul")  # how a mask of large negative numbers comes in
# What may stand between a mask and the Softmax that it is for
_CARRIES = (
    "Add", "Where", "Mul", "Cast", "Expand", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Concat",
)  # fmt: skip
_SOFTMAX = ("Softmax", "LogSoftmax")
_FOLLOWED = 16  # nodes from a mask to its Softmax


def to_half(node: ir.Node, index: int, array: Array, half: ir.DataType) -> Array | None:
    """Return a node's constant input in half precision, None where the node must stay float32.

    Args:
        node: Who reads it.
        index: As which input.
        array: float32.
        half: FLOAT16 or BFLOAT16.
    """
    kind = half.numpy()
    info = ml_dtypes.finfo(kind)
    largest, smallest = float(info.max), float(info.smallest_normal)
    finite = array[np.isfinite(array)]
    sizes = np.abs(finite[finite != 0])
    if sizes.size and float(sizes.max()) < smallest:
        return None
    if node.op_type == "Div" and index == 1 and sizes.size and float(sizes.min()) < smallest:
        return None
    with np.errstate(over="ignore"):
        rounded = array.astype(kind)
        overflows = np.isfinite(array) & ~np.isfinite(rounded)
    if not overflows.any():
        return rounded
    if node.op_type in _BOUNDS:
        return np.where(overflows, np.copysign(largest, array), array).astype(kind)
    masks = node.op_type in _MASKS and bool((array[overflows] < 0).all())
    if masks and _only_masks(node, _FOLLOWED):
        return np.where(overflows, np.float32(-largest / 2), array).astype(kind)
    return None


def is_in_range(array: Array, half: ir.DataType) -> bool:
    """Return whether rounding makes no finite number infinite."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(np.isfinite(array), np.isfinite(array.astype(half.numpy()))))


def _only_masks(node: ir.Node, steps: int) -> bool:
    """Return whether all that a node makes goes into Softmax, through nothing but what carries a mask there."""
    users = [use.node for value in node.outputs for use in value.uses()]
    if not users or any(value.is_graph_output() for value in node.outputs) or not steps:
        return False
    return all(
        user.op_type in _SOFTMAX or (user.op_type in _CARRIES and _only_masks(user, steps - 1)) for user in users
    )
