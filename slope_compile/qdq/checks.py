"""The laws that a stored weight must obey, checked on what the reader found; each breach names its tensor.

TensorRT's parser refuses scales that are not positive and zero points that are not 0; onnx.checker and ONNX Runtime
take both in silence, and neither looks at a sparsity pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.compression.codes import CodedTensor
from slope_compile.compression.groups import blocks, count_groups
from slope_compile.qdq.weights import CodedWeight

SQUARE = 512  # elements of a side


@dataclass(frozen=True)
class Finding:
    """One broken law: the tensor, the rule, and where and by how much it is broken."""

    tensor: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.tensor}: {self.rule}: {self.detail}"


def check_weight(weight: CodedWeight, bits: int | None, pattern: tuple[int, int] | None) -> list[Finding]:
    """Return what a stored weight breaks of: n:m pattern, b-bit range, positive finite scales, zero points of 0.

    Args:
        weight: What the reader found.
        bits: Declared bits of the codes; None for a weight that was left in float.
        pattern: Declared (n, m), or None for a dense weight.
    """
    findings = [] if pattern is None else check_pattern(weight, *pattern)
    if bits is not None:
        findings += check_range(weight, bits)
    return findings + check_scale(weight) + check_zero_point(weight)


def check_pattern(weight: CodedWeight, n: int, m: int) -> list[Finding]:
    """Return a finding if a group of m along the input channel holds more than n nonzeros.

    Groups are m consecutive input channels for one output channel and one kernel position (TensorRT developer guide,
    structured sparsity): axis 1 of K, C, R, S; axis 0 of a MatMul's K, N; Gemm by transB.
    """
    stored, axis = weight.consumed(weight.stored), weight.consumed_axis
    if stored.shape[axis] % m:
        detail = f"{stored.shape[axis]} input channels are no multiple of {m}, so {n}:{m} cannot hold"
        return [Finding(weight.name, "pattern", detail)]
    found = count_groups(stored, n, m, axis)
    if found.first is None:
        return []
    detail = (
        f"{found.broken} of {found.total} groups of {m} have over {n} nonzeros, "
        f"the first from {list(found.first)} on along axis {axis} of the {weight.op} weight {list(stored.shape)}"
    )
    return [Finding(weight.name, "pattern", detail)]


def check_range(weight: CodedWeight, bits: int) -> list[Finding]:
    """Return a finding if the weight is stored as floats, or codes leave [−2^(bits−1), 2^(bits−1) − 1]."""
    if weight.codes is None:
        return [Finding(weight.name, "range", f"stored as {weight.dtype}, though {bits}-bit codes are declared")]
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    smallest, largest = int(weight.codes.min(initial=0)), int(weight.codes.max(initial=0))
    if low <= smallest and largest <= high:
        return []
    outside = count_where(lambda codes: (codes < low) | (codes > high), weight.codes)[0]
    detail = f"{outside} codes lie outside [{low}, {high}] of {bits} bits; they span [{smallest}, {largest}]"
    return [Finding(weight.name, "range", detail)]


def check_scale(weight: CodedWeight) -> list[Finding]:
    """Return a finding if a coded weight has no scale, or one that is not finite and positive."""
    if weight.scale is None:
        return [] if weight.codes is None else [Finding(weight.name, "scale", "codes without a scale")]
    bad = ~(np.isfinite(weight.scale) & (weight.scale > 0))
    if not bad.any():
        return []
    first = _first(bad)
    where = f"the first at {first}: {weight.scale[tuple(first)]}"
    detail = f"{np.count_nonzero(bad)} of {bad.size} are not positive and finite, {where}"
    return [Finding(weight.name, "scale", detail)]


def check_zero_point(weight: CodedWeight) -> list[Finding]:
    """Return a finding if a zero point is not 0."""
    if weight.zero_point is None or not weight.zero_point.any():
        return []
    bad = weight.zero_point != 0
    first = _first(bad)
    where = f"the first at {first}: {weight.zero_point[tuple(first)]}"
    return [Finding(weight.name, "zero point", f"{np.count_nonzero(bad)} of {bad.size} are not 0, {where}")]


def compare(weight: CodedWeight, expected: CodedTensor) -> list[Finding]:
    """Return where a stored weight differs from the trained one: shape, codes, or scale, all bit for bit."""
    codes, scale = np.asarray(expected.codes), np.asarray(expected.scale, np.float32)
    if weight.codes is None:
        return [Finding(weight.name, "codes", f"stored as {weight.dtype}, not as codes")]
    if weight.codes.shape != codes.shape:
        return [Finding(weight.name, "shape", f"stored as {list(weight.codes.shape)}, trained as {list(codes.shape)}")]
    findings = []
    count, first = count_where(np.not_equal, weight.codes, codes)
    if count:
        findings.append(Finding(weight.name, "codes", _differ(count, codes.size, first)))
    stored = weight.channel_scale(expected.axis)
    if stored is None:
        findings.append(Finding(weight.name, "scale", f"is not one number per channel of axis {expected.axis}"))
    else:
        different = stored.view(np.uint32) != scale.view(np.uint32)
        if different.any():
            place = _first(different)
            findings.append(Finding(weight.name, "scale", _differ(int(np.count_nonzero(different)), scale.size, place)))
    return findings


def check_model(weights: Iterable[CodedWeight], expected: Mapping[str, CodedTensor]) -> list[Finding]:
    """Return every law that a file's weights break, given the trained codes; a missing tensor is a finding too."""
    found: dict[str, list[CodedWeight]] = {}
    for weight in weights:
        found.setdefault(weight.name, []).append(weight)
    findings = []
    for name, tensor in expected.items():
        if name not in found:
            findings.append(Finding(name, "missing", "no Conv, MatMul or Gemm of the file multiplies with it"))
        for weight in found.get(name, []):
            findings += check_weight(weight, tensor.bits, tensor.pattern) + compare(weight, tensor)
    return findings


def count_where(test: Callable[..., npt.NDArray[np.bool_]], *arrays: npt.NDArray[Any]) -> tuple[int, list[int]]:
    """Count the elements of which something is true, a block at a time.

    Args:
        test: Takes as many arrays and returns what is true of each element.
        arrays: All of one shape.

    Returns:
        How many, and the index of the first; an empty list where there is none.
    """
    shape = arrays[0].shape
    count, first = 0, None
    orders = [sorted(range(len(shape)), key=lambda axis: -abs(array.strides[axis])) for array in arrays]
    order = orders[0]
    back = np.argsort(order)
    laid = [array.transpose(order) for array in arrays]
    # Arrays that lie in memory in different orders are read in squares, so that no line of a cache is read twice.
    longest = SQUARE if any(other != order for other in orders) else None
    for where in blocks(tuple(shape[axis] for axis in order), longest=longest):
        true = test(*(array[where] for array in laid))
        if here := int(np.count_nonzero(true)):
            count += here
            place = [where[index].start + at for index, at in zip(back, _first(true.transpose(back)), strict=True)]
            first = place if first is None else min(first, place)
    return count, first or []


def _differ(count: int, size: int, first: list[int]) -> str:
    return f"{count} of {size} differ from the trained ones, the first at {first}"


def _first(mask: npt.NDArray[Any]) -> list[int]:
    return [int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape)]


def float_bits(array: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """Return the bits of values as float32: so compared, NaN equals itself, and 0 does not equal -0."""
    return np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
