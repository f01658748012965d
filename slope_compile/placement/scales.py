"""Scales of a matrix repeated per block, as TensorRT wants them beside INT4, and back to one per channel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from slope_compile.qdq.matrices import BLOCKS
from slope_compile.qdq.weights import CodedWeight


def blocked_scale(weight: CodedWeight, block: int) -> npt.NDArray[np.float32] | None:
    """Return a matrix's scales repeated per block of input channels; None if one block would need two scales.

    Args:
        weight: Codes [N, K] or [K, N] in the stored layout.
        block: Input channels that share a scale; the last block may be shorter.

    Returns:
        float32 in the codes' shape, K divided by `block` and rounded up.
    """
    axis, rows = weight.reduction_axis, _along_reduction(weight)
    if axis is None or rows is None:
        return None
    channels = weight.stored.shape[axis]
    starts = np.arange(0, channels, block)
    firsts = rows[:, starts]
    lengths = np.diff([*starts, channels])
    if not np.array_equal(np.repeat(firsts, lengths, axis=1), rows):
        return None
    return np.ascontiguousarray(np.moveaxis(firsts, 1, axis))


def row_scale(weight: CodedWeight) -> npt.NDArray[np.float32] | None:
    """Return one scale per output channel of a matrix, float32 [N]; None if a channel has several."""
    rows = _along_reduction(weight)
    if rows is None or not np.array_equal(np.broadcast_to(rows[:, :1], rows.shape), rows):
        return None
    return np.ascontiguousarray(rows[:, 0])


def default_block(channels: int) -> int:
    """Return the block size for K input channels: what leaves least to pad, not all of K in one block, 128 before 64.

    A single block is one scale per channel again, and TensorRT-RTX 1.7.1 then leaves INT4 outside the matrix product.
    """
    return min(BLOCKS, key=lambda block: (-channels % block, channels <= block, -block))


def _along_reduction(weight: CodedWeight) -> npt.NDArray[np.float32] | None:
    """Return the scale of every code, [N, K], output channels first."""
    axis = weight.reduction_axis
    if axis is None or weight.stored.ndim != 2 or weight.scale is None:
        return None
    ones = np.broadcast_to(np.int8(1), weight.stored.shape)
    scales = replace(weight, stored=ones, dtype="INT8", zero_point=None, value_dtype="FLOAT").values()
    return np.moveaxis(np.broadcast_to(scales, ones.shape), axis, 1)
