"""N:M sparsity: in every m weights along the reduction axis, keep the n of largest magnitude.

Sources: SR-STE, https://arxiv.org/abs/2102.04010 (groups along the input channel); NVIDIA 2:4,
https://arxiv.org/abs/2104.08378.
Letters: g groups, m group size, n kept, r elements after the reduction axis (R*S of a conv, 1 of a linear layer).

The order is total, so exactly n are kept, always: magnitudes are compared as the integers that their bits spell (for
IEEE floats |a| < |b| exactly when the bits of |a| are the smaller integer). -0 equals +0, subnormals are told apart
even where the hardware flushes them, and a NaN is larger than everything: it is kept, so that it reaches the loss
instead of vanishing under the mask. Of equal magnitudes the lower index is kept.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The integer type that a float type's bits are read as, and the index of its sign bit.
_BITS = {
    torch.float16: (torch.int16, 15),
    torch.bfloat16: (torch.int16, 15),
    torch.float32: (torch.int32, 31),
    torch.float64: (torch.int64, 63),
}


def nm_mask(weight: Tensor, n: int, m: int, axis: int = 1) -> Tensor:
    """Return the mask of the n largest magnitudes of every m weights along an axis; ties go to the lower index.

    Args:
        weight: Any floating-point tensor whose axis `axis` has a length divisible by m.
        n: Weights kept in a group, 0 <= n <= m.
        m: Group size.
        axis: The reduction axis: 1 for conv (K, C, R, S) and linear (O, I) weights.

    Returns:
        bool, the shape of `weight`, exactly n true in every group.

    Raises:
        ValueError: If m does not divide the axis, or n is not within 0 to m.
    """
    groups = _groups(weight.detach().contiguous(), n, m, axis)  # [m, g, r], a view
    mask = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    torch.lt(_rank_below(groups, n), 0, out=_groups(mask, n, m, axis))
    return mask


def keep_largest(weight: Tensor, n: int, m: int, out: Tensor) -> None:
    """Write S(W; n, m) into `out`: the weights that `nm_mask` keeps along axis 1, and +0 elsewhere.

    Args:
        weight: Float, contiguous, shape (K, C, ...), C divisible by m.
        n: Weights kept in a group.
        m: Group size.
        out: Contiguous, shape and type of `weight`.
    """
    integer, sign_bit = _BITS[weight.dtype]
    groups = _groups(weight, n, m, 1)  # [m, g, r], a view
    kept = _rank_below(groups, n).bitwise_right_shift_(sign_bit)  # all ones where kept, else all zeros
    torch.bitwise_and(groups.view(integer), kept, out=_groups(out, n, m, 1).view(integer))


def _groups(tensor: Tensor, n: int, m: int, axis: int) -> Tensor:
    """View a contiguous tensor as [m, groups, elements after the axis]."""
    axis %= tensor.dim()
    if not (0 <= n <= m and m >= 1) or tensor.shape[axis] % m:
        raise ValueError(f"axis {axis} of shape {tuple(tensor.shape)} has no whole groups for a {n}:{m} pattern")
    return tensor.view(-1, m, math.prod(tensor.shape[axis + 1 :])).transpose(0, 1)


def _rank_below(groups: Tensor, n: int) -> Tensor:
    """Return rank - n of each weight in its group (rank 0: the largest), so kept means < 0; integers [m, g, r].

    Integer subtraction and shifts instead of comparisons: torch vectorises them several times better than anything
    that makes or reads booleans, and the copy of `groups` to [m, g, r] makes every operand one contiguous run.
    """
    integer, sign_bit = _BITS[groups.dtype]
    m = groups.shape[0]
    key = torch.empty(groups.shape, dtype=integer, device=groups.device)
    torch.bitwise_and(groups.view(integer), torch.iinfo(integer).max, out=key)  # |w| as an integer
    # Before any comparison each weight ranks behind the lower indices of its group; where one loses, they swap.
    start = torch.arange(-n, m - n, dtype=integer, device=groups.device)
    rank = start.view(m, 1, 1).repeat(1, *key.shape[1:])
    for distance in range(1, m):
        lost = (key[:-distance] - key[distance:]).bitwise_right_shift_(sign_bit)  # -1 where i < i + distance, else 0
        rank[:-distance].sub_(lost)
        rank[distance:].add_(lost)
    return rank
