"""How what a layer makes differs from what it should make, in words, where its constants do not tell."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from slope_compile.verify.chain.runners import Array

NEAR = 1e-3  # of the largest value: what a test calls equal
LEVELS = 256  # of an 8-bit quantizer
MOST_CHANNELS = 8192


def tensor_cause(expected: Array, found: Array) -> str:
    """Return how a tensor differs from the expected one.

    Args:
        expected: The reference's.
        found: The tested side's, made from the reference's own inputs.
    """
    if expected.shape != found.shape:
        turned = "transposed: " if sorted(expected.shape) == sorted(found.shape) else ""
        return f"{turned}of shape {list(found.shape)}, expected {list(expected.shape)}"
    bad = int(np.count_nonzero(~np.isfinite(found) & np.isfinite(expected)))
    if bad:
        return f"NaN or infinity: {bad} of {found.size} values"
    a, b = expected.astype(np.float64), found.astype(np.float64)
    tests: tuple[Callable[[Array, Array], str | None], ...] = (
        _quantized, _factor, _clipped, _offset, _exchanged, _permuted, _precision,
    )  # fmt: skip
    told = next((told for test in tests if (told := test(a, b))), None)
    return told or _single(a, b)


def _quantized(a: Array, b: Array) -> str | None:
    steps = [_step(one) for one in (a, b)]
    if steps[0] and not steps[1]:
        return f"missing output quantizer: the reference lies on a grid of step {steps[0]:.6g}, this does not"
    if steps[1] and not steps[0]:
        return f"extra output quantizer: this lies on a grid of step {steps[1]:.6g}, the reference does not"
    return None


def _step(values: Array) -> float | None:
    """Return the step of the grid on which all values lie, at most 256 of them; None without one."""
    distinct = np.unique(values)
    if not 3 <= distinct.size <= LEVELS or distinct.size > values.size / 4:
        return None
    step = float(np.min(np.diff(distinct)))
    levels = distinct / step
    regular = np.allclose(levels, np.rint(levels), atol=1e-3) and np.ptp(levels) <= LEVELS
    return step if regular else None


def _factor(a: Array, b: Array) -> str | None:
    square = float((a * a).sum())
    factor = float((a * b).sum()) / square if square else 0.0
    if factor == 0 or not _explains(factor * a, a, b):
        return None
    exponent = np.log2(abs(factor))
    sign = "sign flipped" if factor < 0 else ""
    if abs(abs(factor) - 1) < NEAR:
        return sign
    power = abs(exponent - round(float(exponent))) < NEAR
    told = (
        f"scale off by a power of two: x {2.0 ** round(float(exponent)):g}" if power else f"scale off by {factor:.4g}"
    )
    return f"{sign} and {told}" if sign else told


def _clipped(a: Array, b: Array) -> str | None:
    if a.min() < 0 and _explains(np.maximum(a, 0), a, b):
        return "unsigned clipped: the negative values are 0"
    if b.min() < 0 and a.min() >= 0 and _explains(np.maximum(b, 0), b, a):
        return "missing Relu: negative values are left that the reference does not have"
    low, high = float(b.min()), float(b.max())
    if (a.min() < low or a.max() > high) and _explains(np.clip(a, low, high), a, b):
        return f"clipped to {low:.4g} ... {high:.4g}"
    return None


def _offset(a: Array, b: Array) -> str | None:
    apart = b - a
    for axis in {1, a.ndim - 1} if a.ndim > 1 else ():
        rest = tuple(index for index in range(a.ndim) if index != axis)
        if a.size == a.shape[axis]:
            continue
        each = apart.mean(axis=rest, keepdims=True)
        if _largest(apart - each) <= NEAR * _largest(each):
            return f"bias missing or another one: the difference is one number a channel (axis {axis})"
    return None


def _exchanged(a: Array, b: Array) -> str | None:
    for first in range(1, a.ndim):
        for second in range(first + 1, a.ndim):
            turned = b.swapaxes(first, second)
            if turned.shape == a.shape and _explains(turned, b, a):
                return f"transposed: axes {first} and {second} are exchanged"
    return None


def _permuted(a: Array, b: Array) -> str | None:
    for axis in {1, a.ndim - 1} if a.ndim > 1 else ():
        channels = a.shape[axis]
        if not 1 < channels <= MOST_CHANNELS:
            continue
        rows = [np.moveaxis(one, axis, 0).reshape(channels, -1) for one in (a, b)]
        mix = np.random.default_rng(0).standard_normal(rows[0].shape[1])  # tells rows apart by one number each
        marks = [one @ mix for one in rows]
        moved = int(np.count_nonzero(np.abs(rows[0] - rows[1]).max(axis=1) > NEAR * _largest(a)))
        if moved > 1 and _explains(np.sort(marks[0]), marks[0], marks[1], np.sort(marks[1])):
            return f"channels permuted: {moved} of {channels} along axis {axis} are others"
    return None


def _precision(a: Array, b: Array) -> str | None:
    """Return to which precision the values seem to be rounded, where they are the same values otherwise."""
    error = _largest(b - a) / (_largest(a) or 1.0)
    if error > 0.1:
        return None
    for kind, name in ((ml_dtypes.bfloat16, "BF16"), (np.float16, "FP16")):
        with np.errstate(over="ignore"):
            whole = [np.array_equal(one.astype(kind).astype(np.float64), one) for one in (a, b)]
        if whole[1] and not whole[0]:
            return f"rounded to lower precision: all values are {name}"
    apart = np.abs(b - a)
    if np.count_nonzero(apart > error * _largest(a) / 64) < apart.size / 2:
        return None  # rounding is everywhere
    if error <= 2.0**-8:
        return f"computed at lower precision: off by {error:.1e} everywhere, as products in FP16, TF32 or BF16 are"
    return f"computed at lower precision: off by {error:.1e} everywhere, as products of 8-bit integers are"


def _single(a: Array, b: Array) -> str:
    apart = np.abs(b - a)
    different = apart > NEAR * _largest(a)
    if not different.any():
        different = apart > apart.max() / 2
    first = [int(index) for index in np.unravel_index(int(np.argmax(different)), different.shape)]
    return f"unknown: {np.count_nonzero(different)} of {a.size} values differ, the first at {first}"


def _explains(changed: Array, a: Array, b: Array, target: Array | None = None) -> bool:
    """Return whether a change of `a` comes near `b`, and nearer by far than `a` is: rounding alone is near too."""
    left = _largest(changed - (b if target is None else target))
    return left <= NEAR * _largest(b) and left <= _largest(b - a) / 8


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))
