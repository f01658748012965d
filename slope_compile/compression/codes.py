"""CodedTensor: the one type that runs through every stage. No torch here: a device that has none reads codes too.

Letters: K output filters, C input channels, b bits, (n, m) at most n nonzeros in every m input channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.compression.groups import count_groups
from slope_compile.errors import ArtifactError

REDUCTION_AXIS = 1  # conv weights are (K, C, R, S), linear weights (O, I): a filter sums over axis 1


@dataclass(frozen=True, eq=False)
class CodedTensor:
    """A weight as integer codes and positive scales: weight = codes * scale.

    Attributes:
        codes: int8, the weight's shape; a torch tensor on the host or a numpy array.
        scale: float32 [channels], channels = codes.shape[axis]; the same kind of array as `codes`.
        bits: Codes lie in [-2^(bits-1), 2^(bits-1) - 1].
        axis: The axis that `scale` runs along.
        pattern: (n, m): at most n nonzero codes in every m along axis 1; None where the tensor is dense.
    """

    codes: Any
    scale: Any
    bits: int
    axis: int
    pattern: tuple[int, int] | None

    def dequantize(self) -> Any:
        """Return codes * scale: float32, bit-equal to the weight that the trained layer multiplies with."""
        shape = [1] * len(self.codes.shape)
        shape[self.axis] = -1
        return self.codes * self.scale.reshape(shape)

    @property
    def density(self) -> float:
        """The share of codes that are not zero; below n/m where survivors of the mask round to zero."""
        codes = np.asarray(self.codes)
        return int(np.count_nonzero(codes)) / max(1, codes.size)

    def check(self, name: str) -> None:
        """Prove the laws of a coded tensor.

        Args:
            name: What to call the tensor in an error.

        Raises:
            ArtifactError: If a type or shape is wrong, a code leaves the b-bit range, a scale is not finite or not
                positive, or a group breaks the pattern.
        """
        codes, scale = np.asarray(self.codes), np.asarray(self.scale)
        problem = self._shape_problem(codes, scale) or self._value_problem(codes, scale)
        if problem is None and self.pattern is not None:
            problem = _pattern_problem(codes, *self.pattern)
        if problem is not None:
            raise ArtifactError(f"{name}: {problem}.", "The file was damaged or made by something else: make it anew.")

    def _shape_problem(self, codes: npt.NDArray[Any], scale: npt.NDArray[Any]) -> str | None:
        if codes.dtype != np.int8 or scale.dtype != np.float32:
            return f"codes are {codes.dtype} and scales {scale.dtype}, not int8 and float32"
        if not 2 <= self.bits <= 8:
            return f"{self.bits} bits are declared; 2 to 8 are possible"
        if not 0 <= self.axis < codes.ndim or scale.shape != (codes.shape[self.axis],):
            return f"scales of shape {scale.shape} do not fit axis {self.axis} of codes of shape {codes.shape}"
        return None

    def _value_problem(self, codes: npt.NDArray[Any], scale: npt.NDArray[Any]) -> str | None:
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if codes.min(initial=0) < low or codes.max(initial=0) > high:
            place = _first((codes < low) | (codes > high))
            return f"code {codes[place]} at {place} is outside the {self.bits}-bit range [{low}, {high}]"
        bad = ~(np.isfinite(scale) & (scale > 0))
        if bad.any():
            place = _first(bad)
            return f"scale {scale[place]} of channel {place[0]} is not finite and positive"
        return None


def group_nonzeros(codes: npt.NDArray[Any], m: int, axis: int) -> npt.NDArray[np.uint8]:
    """Count the nonzeros of every group of m along an axis.

    Args:
        codes: Any numeric array; axis `axis` has a length divisible by m.
        m: Group size, at most 255.
        axis: The reduction axis; 1 for conv (K, C, R, S) and linear (O, I) weights.

    Returns:
        uint8, the shape of `codes` with axis `axis` divided by m.

    Raises:
        ValueError: If m does not divide the axis, or is not within 1 to 255.
    """
    axis %= codes.ndim
    if not 1 <= m <= 255 or codes.shape[axis] % m:
        raise ValueError(f"axis {axis} of shape {codes.shape} has no whole groups of {m}")
    before, length, after = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
    nonzero = (codes != 0).view(np.uint8).reshape(math.prod(before), length // m, m, math.prod(after))
    count: npt.NDArray[np.uint8] = nonzero[:, :, 0].copy()
    for j in range(1, m):  # m adds over whole slices: a sum over the short axis would run m-element loops
        count += nonzero[:, :, j]
    return count.reshape(*before, length // m, *after)


def kernel_note(n: int, m: int) -> str | None:
    """Say what sparse kernels make of a pattern; None for 2:4, the only one that they know."""
    if (n, m) == (2, 4):
        return None
    # Whatever the weights are, no four channels hold more than two nonzeros.
    within = n <= 2 if m % 4 == 0 else 4 % m == 0 and 2 * n <= m
    if within:
        return f"{n}:{m} reaches sparse kernels as 2:4, the only pattern that they know: its further zeros save no time"
    return f"{n}:{m} is for studies of accuracy: sparse kernels know 2:4 only"


def _pattern_problem(codes: npt.NDArray[Any], n: int, m: int) -> str | None:
    if codes.ndim <= REDUCTION_AXIS or codes.shape[REDUCTION_AXIS] % m:
        return f"a {n}:{m} pattern is declared, but shape {codes.shape} has no whole groups of {m} along axis 1"
    found = count_groups(codes, n, m, REDUCTION_AXIS)
    if found.first is None:
        return None
    row, first, *position = found.first
    where = f"filter {row}, input channels {first} to {first + m - 1}"
    if position:
        where += f", position {tuple(position)}"
    return f"{found.worst} nonzeros in a group of the {n}:{m} pattern ({where}), {found.broken} groups in all"


def _first(flags: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the index of the first true element."""
    return tuple(int(i) for i in np.unravel_index(int(flags.argmax()), flags.shape))
