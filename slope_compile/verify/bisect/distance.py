"""How far two tensors are apart, and what each of them looks like in a few numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slope_compile.verify.chain.runners import Array
from slope_compile.verify.verdict import significant

CHUNK = 2**20  # elements


def relative_error(reference: Array, tested: Array) -> float:
    """Return max|difference| / max|reference|; infinity where shapes differ or one side alone is not finite.

    Where the reference is all zeros, the largest |difference| itself.
    """
    if reference.shape != tested.shape:
        return math.inf
    worst = largest = 0.0
    a, b = reference.reshape(-1), tested.reshape(-1)
    for start in range(0, a.size, CHUNK):  # doubles of a part at a time
        x, y = (one[start : start + CHUNK].astype(np.float64) for one in (a, b))
        finite = np.isfinite(x)
        if not np.array_equal(finite, np.isfinite(y)):
            return math.inf
        x, y = x[finite], y[finite]
        worst = max(worst, float(np.max(np.abs(x - y), initial=0.0)))
        largest = max(largest, float(np.max(np.abs(x), initial=0.0)))
    return worst / largest if largest else worst


def share_beyond(reference: Array, tested: Array, allowed: float) -> float:
    """Return the share of elements that are apart by more than `allowed` of the largest |reference|."""
    if reference.shape != tested.shape:
        return 1.0
    with np.errstate(all="ignore"):
        apart = np.abs(tested.astype(np.float64) - reference)
        largest = float(np.max(np.abs(reference), initial=0.0)) or 1.0
        return float(np.mean(~(apart <= allowed * largest))) if apart.size else 0.0


def statistics(array: Array) -> dict[str, Any]:
    """Return shape, smallest and largest value, mean and standard deviation of what is finite, and how much is not."""
    values = np.asarray(array)[np.isfinite(array)].astype(np.float64)
    told: dict[str, Any] = {"shape": list(array.shape)}
    if values.size:
        told |= {
            "min": significant(float(values.min()), 5),
            "max": significant(float(values.max()), 5),
            "mean": significant(float(values.mean()), 5),
            "std": significant(float(values.std()), 5),
        }
    return told | {"zeros": int(np.count_nonzero(array == 0)), "not_finite": int(array.size - values.size)}
