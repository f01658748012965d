"""The 2:4 pattern: nearly held, held along the wrong axis, or held where no sparse kernel is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.compression.codes import group_nonzeros
from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import SPARSITY, issue
from slope_compile.lint.view import CONVOLUTIONS, Use, View
from slope_compile.qdq.pattern import SPARSE_M, SPARSE_N, is_sparse
from slope_compile.qdq.weights import CodedWeight

NEARLY = 0.99  # a share of groups that no dense weight reaches: of random codes with half zeros 0.69 hold
HALF = 0.5
_PATTERN = f"{SPARSITY}: at least two zeros in every four input channels, for each output channel and kernel position"


@rule(
    "pattern-broken",
    "warning",
    "A 2:4 pattern holds in every group: one group that breaks it makes the layer dense",
    _PATTERN,
    "Mask the weight again after the last step that changed it, before it is quantized.",
)
def pattern_broken(view: View) -> Iterator[Hit]:
    """Weights of which nearly all groups hold."""
    for use, weight in _weights(view):
        consumed = weight.consumed(weight.stored)
        if consumed.shape[weight.consumed_axis] % SPARSE_M or not consumed.size:
            continue
        bad = group_nonzeros(consumed, SPARSE_M, weight.consumed_axis) > SPARSE_N
        broken = int(np.count_nonzero(bad))
        if 0 < broken <= (1 - NEARLY) * bad.size:
            first = [int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape)]
            first[weight.consumed_axis] *= SPARSE_M
            yield Hit(
                use.site.name, f"'{weight.name}': {broken} of {bad.size} groups break 2:4, the first from {first} on"
            )


@rule(
    "pattern-axis",
    "warning",
    "A 2:4 pattern lies along the input channels",
    _PATTERN,
    "Mask along axis 1 of a Conv or Linear weight, along K of a MatMul.",
)
def pattern_axis(view: View) -> Iterator[Hit]:
    """Weights that are 2:4 along another axis, or along all that a filter sums over, flattened."""
    for use, weight in _weights(view):
        if is_sparse(weight):
            continue
        consumed = weight.consumed(weight.stored)
        if 0 < np.count_nonzero(consumed) <= HALF * consumed.size and (where := _other_axis(weight, consumed)):
            yield Hit(use.site.name, f"'{weight.name}' {list(consumed.shape)} is 2:4 along {where}")


@rule(
    "pattern-channels",
    "warning",
    "A sparse layer has a multiple of 4 input channels",
    f"{SPARSITY}: C % 4 == 0",
    "Pad the input channels, or leave this layer dense: its zeros save no time.",
)
def pattern_channels(view: View) -> Iterator[Hit]:
    """Half-empty weights whose channels are no multiple of 4."""
    for use, weight in _weights(view):
        channels = weight.consumed(weight.stored).shape[weight.consumed_axis]
        if channels % SPARSE_M and 0 < np.count_nonzero(weight.stored) <= HALF * weight.stored.size:
            yield Hit(use.site.name, f"'{weight.name}' is half zeros and has {channels} input channels")


@rule(
    "grouped-sparse",
    "warning",
    "A sparse convolution has one group",
    f"{issue(4054)}: TensorRT does not consider sparse kernels for group convolutions",
    "Leave grouped and depthwise convolutions dense: their zeros save no time.",
)
def grouped_sparse(view: View) -> Iterator[Hit]:
    """Grouped convolutions with a 2:4 weight."""
    for use, weight in _weights(view):
        groups = view.integer(use.site, "group", 1)
        if weight.op in CONVOLUTIONS and groups > 1 and is_sparse(weight):
            yield Hit(use.site.name, f"'{weight.name}' is 2:4, in {groups} groups")


@rule(
    "sparse-float-output",
    "warning",
    "A 2:4 layer with quantized activations has a quantized output",
    'github.com/NVIDIA/Model-Optimizer/pull/1664: "A sparse INT8 GEMM is chosen only when its epilogue keeps data in '
    'INT8"',
    "Quantize its output too (slope-compile: compression.quantize_outputs).",
)
def sparse_float_output(view: View) -> Iterator[Hit]:
    """Sparse INT8 layers whose result goes on in floats."""
    for use, weight in _weights(view):
        int8 = weight.codes is not None and view.is_quantized(use.activation)
        if int8 and is_sparse(weight) and not view.leaves_as_int8(use.site):
            yield Hit(use.site.name, f"'{weight.name}' is 2:4 and its activation INT8; its output stays in floats")


def _weights(view: View) -> Iterator[tuple[Use, CodedWeight]]:
    """Yield weights in which a zero is a zero."""
    for use in view.uses:
        weight = use.weight
        if (
            weight is not None
            and weight.stored.size
            and not (weight.zero_point is not None and weight.zero_point.any())
        ):
            yield use, weight


def _other_axis(weight: CodedWeight, consumed: npt.NDArray[Any]) -> str | None:
    """Say along what a weight that is not 2:4 where it should be is 2:4 nevertheless."""
    for axis, length in enumerate(consumed.shape):
        if axis != weight.consumed_axis and length % SPARSE_M == 0 and _holds(consumed, axis):
            return f"axis {axis}, and its products are summed along axis {weight.consumed_axis}"
    flat = consumed.reshape(len(consumed), -1)
    if weight.op == "Conv" and flat.shape[1] % SPARSE_M == 0 and _holds(flat, 1):
        return "its flattened filters, not along the channels of each kernel position"
    return None


def _holds(array: npt.NDArray[Any], axis: int) -> bool:
    return bool(np.max(group_nonzeros(array, SPARSE_M, axis)) <= SPARSE_N)
