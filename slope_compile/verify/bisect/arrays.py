"""How one constant differs from what it should be, in words: a test for each way in which weights go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from slope_compile.qdq.tensors import INTEGER_BITS
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.bisect.parameters import in_torch_layout
from slope_compile.verify.chain.runners import Array

FEW = 0.5  # share of elements up to which a difference is of single ones
SAME = 1e-6  # relative: two float32 products of the same code with the same scale
ALIKE = 0.9  # cosine from which two arrays are the same weights, rounded in another way
HALVES = (("FP16", np.dtype(np.float16)), ("BF16", np.dtype(ml_dtypes.bfloat16)))
Test = Callable[[Array, Array], "str | None"]  # expected, found -> what it is, if it is that


def weight_cause(expected: Array, found: Array, coded: CodedWeight | None) -> str | None:
    """Return how a weight differs from the expected one; None where it is the same, bit for bit.

    Args:
        expected: What the reference multiplies with, output channels first.
        found: What the file makes of its codes, in the same layout.
        coded: How the file stores it; None where it is not coded.
    """
    if expected.shape == found.shape and _same_bits(expected, found):
        return None
    told = None if coded is None else _stored_cause(expected, found, coded)
    if told is None and expected.shape == found.shape and np.isfinite(found).all():
        told = _first(_WHOLE, expected, found)
        if told is None and coded is not None and coded.codes is not None:
            told = _codes_cause(expected, coded)
    return told or array_cause(expected, found)


def array_cause(expected: Array, found: Array) -> str | None:
    """Return how an array differs from the expected one; None where they are equal."""
    if expected.shape != found.shape:
        turned = "transposed: " if sorted(expected.shape) == sorted(found.shape) else ""
        return f"{turned}of shape {list(found.shape)}, expected {list(expected.shape)}"
    if _same_bits(expected, found):
        return None
    bad = int(np.count_nonzero(~np.isfinite(found) & np.isfinite(expected)))
    if bad:
        return f"NaN or infinity: {bad} of {found.size} values"
    return _first((*_WHOLE, *_SINGLE), expected, found)


def transposed(expected: Array, found: Array) -> str | None:
    """Return which axes are exchanged or mirrored."""
    if expected.ndim < 2:
        return None
    for first in range(expected.ndim):
        for second in range(first + 1, expected.ndim):
            turned = found.swapaxes(first, second)
            if turned.shape == expected.shape and _close(turned, expected):
                return f"transposed: axes {first} and {second} are exchanged"
            if _close(np.ascontiguousarray(expected.swapaxes(first, second)).reshape(found.shape), found):
                return f"transposed: the numbers lie as if axes {first} and {second} were exchanged"
    kernel = tuple(range(2, expected.ndim))
    return (
        "mirrored: the kernel is turned by 180 degrees" if kernel and _close(np.flip(found, kernel), expected) else None
    )


def permuted(expected: Array, found: Array) -> str | None:
    """Return along which axis slices lie in another order."""
    for axis, what in _channels(expected):
        rows, wanted = (np.moveaxis(one, axis, 0).reshape(one.shape[axis], -1) for one in (found, expected))
        moved = np.flatnonzero(~np.isclose(rows, wanted, rtol=SAME, atol=0).all(axis=1))
        if len(moved) < 2:
            continue
        orders = [np.lexsort(one[moved].T[::-1]) for one in (rows, wanted)]
        if _close(rows[moved[orders[0]]], wanted[moved[orders[1]]]):
            swapped = f"{what}channels {moved[0]} and {moved[1]} are swapped"
            return swapped if len(moved) == 2 else f"{what}channels are permuted: {len(moved)} of {len(rows)} moved"
    return None


def scaled(expected: Array, found: Array) -> str | None:
    """Return by which factors the array, or single channels of it, are off."""
    if not found.any():
        return "all 0"
    if not np.array_equal(expected == 0, found == 0):
        return None
    ratio = np.divide(found, expected, out=np.ones(found.shape), where=expected != 0, dtype=np.float64)
    factors = [ratio.reshape(-1)[np.flatnonzero(expected)[:1]]] if expected.any() else []
    if factors and np.allclose(ratio[expected != 0], factors[0], rtol=SAME, atol=0):
        return f"{_factor(float(factors[0][0]))}, everywhere"
    for axis, what in _channels(ratio) if ratio.ndim > 1 else ():
        rows, known = (np.moveaxis(one, axis, 0).reshape(one.shape[axis], -1) for one in (ratio, expected != 0))
        each = np.array([row[mask][0] if mask.any() else 1.0 for row, mask in zip(rows, known, strict=True)])
        if not np.allclose(rows[known], np.broadcast_to(each[:, None], rows.shape)[known], rtol=SAME, atol=0):
            continue
        off = np.flatnonzero(~np.isclose(each, 1.0, rtol=SAME, atol=0))
        if len(off):
            return _channel_factors(each, off, what)
    signs = ratio[np.abs(ratio - 1) > SAME]
    if signs.size and np.allclose(signs, -1.0, rtol=SAME):
        return f"sign flipped in {signs.size} of {ratio.size} values"
    return None


def clipped(expected: Array, found: Array) -> str | None:
    """Return whether the negative values, or the largest ones, are gone."""
    if expected.min(initial=0) < 0 <= found.min(initial=0) and _close(np.maximum(expected, 0), found):
        return "unsigned: the negative values are clipped to 0"
    if expected.min(initial=0) < 0 and _close(np.abs(expected), found):
        return "unsigned: the negative values lost their sign"
    low, high = float(found.min(initial=0)), float(found.max(initial=0))
    if _close(np.clip(expected, low, high), found):
        return f"clipped to {low:.4g} ... {high:.4g}"
    return None


def masked(expected: Array, found: Array) -> str | None:
    """Return whether the zeros are other ones, all that is not 0 on both sides being right."""
    both = (expected != 0) & (found != 0)
    if not both.any() or not np.allclose(found[both], expected[both], rtol=SAME, atol=0):
        return None
    added, lost = int(np.sum((expected == 0) & (found != 0))), int(np.sum((expected != 0) & (found == 0)))
    if lost > FEW * np.count_nonzero(expected):
        return None
    if added:
        return f"mask broken: {added} of {found.size} values are not 0 that should be, and {lost} are 0 that should not"
    return f"mask broken: {lost} of {found.size} values are 0 that should not be"


def last_bits(expected: Array, found: Array) -> str | None:
    """Return by how much single values are off, where none is off by more than a few of its last bits."""
    if expected.dtype.kind != "f" or not np.array_equal(expected == 0, found == 0):
        return None
    with np.errstate(all="ignore"):
        apart = np.abs(found.astype(np.float64) / expected - 1)
    relative = float(np.max(apart, where=expected != 0, initial=0.0))
    return f"the last bits differ: by up to {relative:.1e} of a value" if relative <= 2.0**-20 else None


def rounded_to_half(expected: Array, found: Array) -> str | None:
    """Return the type of 16 bits to which the values are rounded: noise of that size is no rounding."""
    kinds = [kind for kind, dtype in HALVES if np.array_equal(_in_half(expected, dtype), found)]
    return f"rounded to lower precision, as {kinds[0]} is" if kinds else None


def single(expected: Array, found: Array) -> str | None:
    """Return how many values differ, where most do not."""
    different = ~np.isclose(found, expected, rtol=SAME, atol=0)
    count = int(np.count_nonzero(different))
    if not 0 < count <= FEW * different.size:
        return None
    first = [int(index) for index in np.unravel_index(int(np.argmax(different)), different.shape)]
    return f"single values differ: {count} of {different.size}, the first at {first}"


def other(expected: Array, found: Array) -> str | None:
    """Return what is left: the same array in another rounding, or another array."""
    a, b = expected.ravel().astype(np.float64), found.ravel().astype(np.float64)
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = float(a @ b) / norms if norms else 0.0
    if cosine >= ALIKE:
        return f"all values differ, at a cosine of {cosine:.4f}: rounded in another way, or of another epoch"
    return f"stale: all values differ, at a cosine of {cosine:.2f}: another run's"


def _stored_cause(expected: Array, found: Array, coded: CodedWeight) -> str | None:
    """Return what the way of storing alone explains: a zero point, a scale that is none, or rounded, a scale's axis."""
    if coded.zero_point is not None and coded.zero_point.any():
        first = coded.zero_point.ravel()[np.flatnonzero(coded.zero_point)[0]]
        return (
            f"zero point not zero: {np.count_nonzero(coded.zero_point)} of {coded.zero_point.size}, the first {first}"
        )
    if coded.scale is not None and not np.isfinite(coded.scale).all():
        return f"NaN or infinity in {np.count_nonzero(~np.isfinite(coded.scale))} of {coded.scale.size} scales"
    if coded.scale is not None and (told := _rounded_scales(expected, found, coded.scale)):
        return told
    if coded.scale is not None and coded.axis is not None and not coded.block_size:
        for axis, length in enumerate(coded.stored.shape):
            if length == coded.scale.size and np.ptp(coded.scale):
                values = coded.stored * _along(coded.scale, axis, coded.stored.ndim)
                turned = in_torch_layout(coded, values)
                if axis != coded.axis and turned.shape == expected.shape and _close(turned, expected):
                    return (
                        f"wrong axis: the scales run along axis {coded.axis} of the codes; along axis {axis} they fit"
                    )
    return None


def _rounded_scales(expected: Array, found: Array, scale: Array) -> str | None:
    """Return the type of 16 bits that holds all scales, where each value is off by no more than rounding to it."""
    if expected.shape != found.shape or not np.array_equal(expected == 0, found == 0):
        return None
    with np.errstate(all="ignore"):
        apart = np.abs(found.astype(np.float64) / expected - 1)
    far = float(np.max(apart, where=expected != 0, initial=0.0))
    for kind, dtype in HALVES:
        if 2.0**-20 < far <= float(ml_dtypes.finfo(dtype).eps) and np.array_equal(_in_half(scale, dtype), scale):
            return f"scales rounded to lower precision, as {kind} is"
    return None


def _codes_cause(expected: Array, coded: CodedWeight) -> str | None:
    """Return how the codes differ from those that the expected weight has with the scales that the file has."""
    codes, wanted = _implied_codes(expected, coded)
    if codes is None or wanted is None or np.array_equal(codes, wanted):
        return None
    bits = INTEGER_BITS[coded.dtype]
    if coded.dtype.startswith("U") and np.array_equal(codes % 2**bits, wanted % 2**bits):
        return f"unsigned: negative codes are read as {coded.dtype}"
    told = _first((transposed, permuted, _neighbours, clipped, masked, single), wanted, codes)
    return None if told is None else told.replace("values", "codes")


def _implied_codes(expected: Array, coded: CodedWeight) -> tuple[Array | None, Array | None]:
    """Return the file's codes and the expected ones in torch's layout; None where the scales do not fit."""
    if coded.scale is None or coded.block_size or not np.all(np.isfinite(coded.scale) & (coded.scale != 0)):
        return None, None
    scale = coded.scale if coded.axis is None else _along(coded.scale, coded.axis, coded.stored.ndim)
    scales = in_torch_layout(coded, np.broadcast_to(scale, coded.stored.shape))
    wanted = np.divide(expected, scales, dtype=np.float64)
    whole = np.rint(wanted)
    if not np.allclose(wanted, whole, atol=1e-4 * max(float(np.abs(whole).max(initial=1.0)), 1.0), rtol=0):
        return None, None
    return in_torch_layout(coded, coded.stored).astype(np.float64), whole


def _neighbours(expected: Array, found: Array) -> str | None:
    flat, wanted = found.ravel(), expected.ravel()
    if flat.size % 2 or not np.array_equal(flat.reshape(-1, 2)[:, ::-1].ravel(), wanted):
        return None
    return "neighbouring codes are swapped: the nibbles of each byte"


def _channels(array: Array) -> list[tuple[int, str]]:
    """Return the axes that slices may be exchanged or scaled along, and what the slices are."""
    return [(0, "")] if array.ndim == 1 else [(0, "output "), (1, "input ")]


def _first(tests: Iterable[Test], expected: Array, found: Array) -> str | None:
    return next((told for test in tests if (told := test(expected, found))), None)


def _channel_factors(each: Array, off: Array, what: str) -> str:
    where = f"{what}channel {off[0]}" if len(off) == 1 else f"{len(off)} of {len(each)} {what}channels"
    if np.allclose(each[off], each[off[0]], rtol=SAME):
        return f"{_factor(float(each[off[0]]))}, in {where}"
    if np.all(each[off] < 0) and np.allclose(each[off], -1.0, rtol=SAME):
        return f"sign flipped in {where}"
    low, high = float(each[off].min()), float(each[off].max())
    return f"scales differ in {where}, by factors of {low:.7g} to {high:.7g}"


def _factor(factor: float) -> str:
    size, exponent = abs(factor), math.log2(abs(factor)) if factor else math.nan
    sign = "sign flipped" if factor < 0 else ""
    if math.isclose(size, 1.0, rel_tol=SAME):
        return sign
    power = abs(exponent - round(exponent)) < 1e-6 if math.isfinite(exponent) else False
    told = f"scale off by a power of two: x {factor:g}" if power else f"scale off by a factor of {factor:.6g}"
    return f"{sign} and {told}" if sign else told


def _along(scale: Array, axis: int, rank: int) -> Array:
    return scale.reshape([-1 if index == axis else 1 for index in range(rank)])


def _in_half(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(all="ignore"):
        return values.astype(dtype).astype(values.dtype)


def _close(a: Array, b: Array) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=SAME, atol=0))


def _same_bits(a: Array, b: Array) -> bool:
    return bool(np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.floating)))


# The same values, but for rounding, in another place, or in another size.
_WHOLE: tuple[Test, ...] = (last_bits, transposed, permuted, scaled)
_SINGLE: tuple[Test, ...] = (clipped, masked, rounded_to_half, single, other)
