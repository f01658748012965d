"""Greedy non-maximum suppression over static shapes, exact, in operators that every TensorRT builds.

Over boxes sorted by score the greedy answer is the one solution of

    keep_i = valid_i and not any(keep_j and IoU_ji > t for j < i)

(keep_i depends on earlier boxes only). Iterating it from keep = valid settles box 0 in the first round, and box i at
the latest one round after all before it: after at most N rounds nothing changes any more, and then it is solved. A
chain of boxes that each overlap the next alone needs all N; the boxes of an image take a handful of rounds. In ONNX it
is a Loop that ends when nothing changes, so there is no number of rounds beyond which it would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnxscript import FLOAT, script
from onnxscript import opset18 as op
from torch import Tensor


def overlaps(boxes: Tensor, threshold: float) -> Tensor:
    """Return 1 where an earlier box (row) overlaps a later one (column) by more than the threshold, else 0.

    Args:
        boxes: float32 [..., N, 4] as x1, y1, x2, y2, the highest score first.
        threshold: Intersection over union, 0 to 1.

    Returns:
        float32 [..., N, N], zero on and below the diagonal.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)  # [..., N]
    area = (x2 - x1) * (y2 - y1)

    def meet(low: Tensor, high: Tensor) -> Tensor:
        start = torch.maximum(low.unsqueeze(-1), low.unsqueeze(-2))
        return (torch.minimum(high.unsqueeze(-1), high.unsqueeze(-2)) - start).clamp(min=0)  # [..., N, N]

    common = meet(x1, x2) * meet(y1, y2)
    iou = common / (area.unsqueeze(-1) + area.unsqueeze(-2) - common)
    return torch.triu((iou > _float32_at_most(threshold)).float(), diagonal=1)


@torch.library.custom_op("slope_compile::suppress", mutates_args=())
def suppress(over: Tensor, valid: Tensor) -> Tensor:
    """Return which boxes greedy suppression keeps.

    Args:
        over: float32 [..., N, N] of 0 and 1: whether box j (row), if kept, removes the later box i (column).
        valid: float32 [..., N] of 0 and 1: boxes of 0 are neither kept nor remove others.

    Returns:
        float32 [..., N] of 0 and 1.
    """
    keep = valid.clone()
    while True:
        hit = torch.matmul(keep.unsqueeze(-2), over).squeeze(-2)  # how many kept boxes remove each box
        settled = valid * (hit <= 0)
        if torch.equal(settled, keep):
            return settled
        keep = settled


@suppress.register_fake
def _(over: Tensor, valid: Tensor) -> Tensor:
    return torch.empty_like(valid)


@torch.library.custom_op("slope_compile::best", mutates_args=())
def best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest values along the last axis and their indices; of equal ones the lower index comes first.

    torch.topk promises no order there, ONNX's TopK does, and torchvision's suppression keeps the order.
    """
    ordered, index = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count].clone(), index[..., :count].clone()


@best.register_fake
def _(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    shape = (*values.shape[:-1], count)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int64)


def _best_onnx(values: FLOAT, count: int) -> Any:
    """The same as one node."""
    return op.TopK(values, op.Constant(value_ints=[count]))


@script(default_opset=op)
def _suppress_onnx(over: FLOAT, valid: FLOAT) -> FLOAT:
    """The same loop in ONNX."""
    zero = op.Constant(value_float=0.0)
    axis = op.Constant(value_ints=[-2])
    keep = op.Identity(valid)
    changed = op.Equal(zero, zero)  # true
    while changed:
        hit = op.Squeeze(op.MatMul(op.Unsqueeze(keep, axis), over), axis)
        settled = op.Mul(valid, op.Cast(op.LessOrEqual(hit, zero), to=1))
        changed = op.Greater(op.ReduceMax(op.Abs(op.Sub(settled, keep)), keepdims=0), zero)
        keep = op.Identity(settled)
    return keep


def _float32_at_most(threshold: float) -> float:
    """Return the largest float32 that is not above a threshold: no float32 lies between the two.

    torchvision compares a float32 overlap with a double; in ONNX both are float32.
    """
    nearest = np.float32(threshold)
    return float(nearest if float(nearest) <= threshold else np.nextafter(nearest, np.float32(-1)))


# What torch.onnx.export makes of the operators that are defined here.
TRANSLATIONS: dict[Callable[..., Any], Any] = {
    torch.ops.slope_compile.suppress.default: _suppress_onnx,
    torch.ops.slope_compile.best.default: _best_onnx,
}
