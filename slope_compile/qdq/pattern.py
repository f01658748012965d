"""Whether a stored weight fits NVIDIA's sparse tensor cores: counted, not believed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.compression.groups import count_groups
from slope_compile.qdq.weights import CodedWeight

SPARSE_N, SPARSE_M = 2, 4  # the pattern of NVIDIA's sparse tensor cores


def is_sparse(weight: CodedWeight) -> bool:
    """Return whether a weight fits NVIDIA's sparse tensor cores: at most 2 nonzeros in every 4 input channels."""
    shifted = weight.zero_point is not None and bool(np.any(weight.zero_point))
    return not shifted and fits_sparse_cores(weight.consumed(weight.stored), weight.consumed_axis)


def fits_sparse_cores(codes: npt.NDArray[Any], axis: int) -> bool:
    """Return whether at most 2 of every 4 numbers along an axis are not zero.

    Counted, so that 1:4 and 2:8 fit too. An array that is all zeros says nothing and does not count.

    Args:
        codes: Codes or values.
        axis: The one that products are summed over.
    """
    if codes.shape[axis] % SPARSE_M or not codes.any():
        return False
    return not count_groups(codes, SPARSE_N, SPARSE_M, axis).broken
