"""What is lost when dequantized weights are rounded to FP16 or BF16: measured on the weight itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import numpy.typing as npt

from slope_compile.qdq.weights import CodedWeight

_TYPES = {"FLOAT16": np.dtype(np.float16), "BFLOAT16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Rounding:
    """How far values move.

    Args:
        dtype: `FLOAT16` or `BFLOAT16`.
        relative: Largest |rounded - exact| / |exact| over the codes and scales that occur.
        ulp: Largest |rounded - exact| in units of the last place of the rounded value.
        overflows: Whether a finite value becomes infinite.
    """

    dtype: str
    relative: float
    ulp: float
    overflows: bool

    def __str__(self) -> str:
        return f"rounding to {self.dtype} moves a weight by at most {self.relative:.2g} of it, {self.ulp:.2g} ulp"


def exact_values(weight: CodedWeight) -> npt.NDArray[np.float32]:
    """Return codes times scale in float32, before any cast that follows in the graph."""
    values: npt.NDArray[np.float32] = replace(weight, value_dtype="FLOAT").values().astype(np.float32, copy=False)
    return values


def rounded(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """Return float32 values rounded to a type of 16 bits, ties to even, as float32 again.

    Args:
        values: What is rounded.
        dtype: `FLOAT16` or `BFLOAT16`.
    """
    with np.errstate(over="ignore"):
        narrow: npt.NDArray[np.float32] = values.astype(_TYPES[dtype]).astype(np.float32)
    return narrow


def rounding(weight: CodedWeight, dtype: str) -> Rounding:
    """Return what rounding a weight's values to a type of 16 bits does to them.

    Args:
        weight: The weight.
        dtype: `FLOAT16` or `BFLOAT16`.
    """
    values = _distinct(weight)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        narrow = values.astype(_TYPES[dtype])
        back = narrow.astype(np.float32)
        overflows = bool(np.any(np.isinf(back) & np.isfinite(values)))
        error = np.abs(back.astype(np.float64) - values)
        relative = np.max(error / np.abs(values), where=values != 0, initial=0.0)
        ulp = np.max(error / np.abs(_spacing(narrow)), where=np.isfinite(back), initial=0.0)
    return Rounding(dtype, float(relative), float(ulp), overflows)


def _distinct(weight: CodedWeight) -> npt.NDArray[np.float32]:
    """Return every value that a weight can have: each code that occurs times each scale, without the millions."""
    if weight.codes is None or weight.scale is None or weight.zero_point is not None:
        return exact_values(weight)
    products: npt.NDArray[np.float32] = np.unique(weight.codes).astype(np.float32)[:, None] * np.unique(weight.scale)
    return products


def _spacing(narrow: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Return the distance to the next larger magnitude of the type."""
    step: npt.NDArray[np.float64] = np.spacing(np.abs(narrow)).astype(np.float64)
    return step
