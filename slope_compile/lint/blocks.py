"""Block scales of weights: which lengths, axes and types TensorRT takes."""

from __future__ import annotations

from collections.abc import Iterator

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import HEADER, SCHEMES, observed
from slope_compile.lint.view import CONVOLUTIONS, Use, View
from slope_compile.qdq.weights import CodedWeight


@rule(
    "int4-block-size",
    "error",
    "TensorRT takes INT4 weights in blocks of 64 or 128",
    f'{SCHEMES}: "INT4 quantization requires per-block scales. The supported block sizes are {{64, 128}}"',
    "Quantize in blocks of 128 or 64, or per channel.",
)
def int4_block_size(view: View) -> Iterator[Hit]:
    """INT4 matrices in blocks of another length, or in none."""
    blocks = view.situation.backend.gemm_int4_blocks
    if blocks is None:
        return
    for use, weight in _coded(view, "INT4"):
        if weight.op not in CONVOLUTIONS and weight.block_size not in blocks:
            size = f"blocks of {weight.block_size}" if weight.block_size else "no blocks"
            yield Hit(use.site.name, f"'{weight.name}' has {size}", mended=use.movable)


@rule(
    "block-axis",
    "error",
    "Blocks lie along one of the last two axes",
    f'{SCHEMES}: "The block dimension should be one of the last two dimensions"; '
    + observed('"The blocking dimension must be the last or second to last dimension"'),
    "Quantize a convolution per channel; a matrix has no other axes.",
)
def block_axis(view: View) -> Iterator[Hit]:
    """Blocks along an earlier axis."""
    for use, weight in _coded(view):
        if weight.block_size and weight.axis is not None and weight.axis < weight.stored.ndim - 2:
            detail = f"'{weight.name}' {list(weight.stored.shape)} has blocks along axis {weight.axis}"
            yield Hit(use.site.name, detail, mended=use.movable)


@rule(
    "block-tail",
    "error",
    "An axis holds whole blocks",
    observed(
        "the parser divides the axis by the number of scales: 200 by 2 passes, whatever block_size says, 256 by 3 fails"
    )
    + f'; {HEADER}: "the shape of scale tensor must match the shape of the input, except for the blocking dimension"',
    "Choose a block length that divides K, or pad the weight.",
)
def block_tail(view: View) -> Iterator[Hit]:
    """A last block that is shorter than the others."""
    for use, weight in _coded(view):
        if weight.block_size and weight.axis is not None and weight.stored.shape[weight.axis] % weight.block_size:
            detail = f"'{weight.name}': {weight.stored.shape[weight.axis]} elements in blocks of {weight.block_size}"
            yield Hit(use.site.name, detail, mended=use.movable)


@rule(
    "block-type",
    "error",
    "TensorRT takes block scales with FP4, FP8 and INT4 only",
    f'{HEADER}: "Block quantization is supported for input types kFP4, kFP8 and kINT4"',
    "Quantize INT8 weights per channel.",
)
def block_type(view: View) -> Iterator[Hit]:
    """INT8 in blocks."""
    if view.situation.backend.gemm_int4_blocks is None:
        return
    for use, weight in _coded(view, "INT8"):
        if weight.block_size:
            yield Hit(use.site.name, f"'{weight.name}' is INT8 in blocks of {weight.block_size}", mended=use.movable)


def _coded(view: View, dtype: str | None = None) -> Iterator[tuple[Use, CodedWeight]]:
    for use in view.uses:
        if use.weight is not None and use.weight.codes is not None and dtype in (None, use.weight.dtype):
            yield use, use.weight
