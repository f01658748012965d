"""Whether a stored weight fits NVIDIA's sparse tensor cores: counted, not believed."""

from __future__ import annotations

import numpy as np

from slope_compile.compression.codes import group_nonzeros
from slope_compile.qdq.weights import CodedWeight

SPARSE_N, SPARSE_M = 2, 4  # the pattern of NVIDIA's sparse tensor cores


def is_sparse(weight: CodedWeight) -> bool:
    """Return whether a weight fits NVIDIA's sparse tensor cores: at most 2 nonzeros in every 4 input channels.

    Counted, not believed; a weight with 1:4 or 2:8 fits too. One that is all zeros says nothing and does not count.
    """
    codes = weight.consumed(weight.stored)
    shifted = weight.zero_point is not None and bool(np.any(weight.zero_point))
    if shifted or codes.shape[weight.consumed_axis] % SPARSE_M or not codes.any():
        return False
    return bool(np.max(group_nonzeros(codes, SPARSE_M, weight.consumed_axis)) <= SPARSE_N)
