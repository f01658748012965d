"""How far two correct implementations of one network may differ, relative to the largest |output|.

Letters: K - length of a reduction (input channels × kernel), u - 2^-24, the unit roundoff of float32, h - 2^-11 (FP16)
or 2^-8 (BF16), n - tensors in half precision, b - block of a product in 8 bits.

    err(network)  = 2u * sum over layers of sqrt(K)             two orders of each sum, one sign over depth
    ten bits      : + 2^-10 for each layer that has them        TF32 products, float16 weights
    half          : + 2h * sqrt(n)                              independent roundings, factor 2 for margin
    eight bits    : + 2 * sqrt(sum over products of b) / (127 * sqrt(12))                    MatMulNBits of ONNX Runtime
    quantizers    : + 2 * move(eps), eps = err / sqrt(layers)   jitter before each, measured on the file (`segments.py`)

Each is derived in docs/verify.md, "Tolerances, derived" and "Quantized activations", with the margins measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from slope_compile.qdq.reader import CodedWeight

EPS32 = 2.0**-23
EPS_TEN_BITS = 2.0**-10
ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}
EIGHT_BITS = 1 / (127 * math.sqrt(12))  # deviation of rounding to 127 steps, relative to the largest of a block


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed |difference|, relative to the largest |output| of the reference."""

    relative: float
    derivation: str


def tolerance_of(weights: Iterable[CodedWeight], ten_bits: bool = False, products: Sequence[int] = ()) -> Tolerance:
    """Derive the tolerance of a network, or of its segments, from the weights that its file holds.

    Args:
        weights: What the reader found.
        ten_bits: Whether one of the two implementations may multiply in TF32.
        products: K of further layers, whose weights the reader does not read.
    """
    layers, root_sum, rounded = len(products), sum(math.sqrt(max(k, 0)) for k in products), 0
    for weight in weights:
        layers, root_sum = layers + 1, root_sum + math.sqrt(reduction_length(weight))
        rounded += ten_bits or weight.value_dtype == "FLOAT16"
    relative = EPS32 * max(root_sum, 1.0)
    derivation = f"2^-23 x sum of sqrt(K) = {root_sum:.0f} over {layers} layers"
    if rounded:
        relative += EPS_TEN_BITS * rounded
        derivation += f", + 2^-10 for each of {rounded}"
    return Tolerance(relative, derivation)


def in_half(tolerance: Tolerance, tensors: int, precision: str) -> Tolerance:
    """Return the tolerance where one of the two implementations keeps tensors in half precision.

    Args:
        tolerance: That of floats.
        tensors: How many it keeps so.
        precision: `fp16` or `bf16`.
    """
    error = 2 * ROUNDOFF[precision] * math.sqrt(tensors)
    told = f"{tolerance.derivation}, + 2 x {ROUNDOFF[precision]:.1e} x sqrt({tensors}) for {precision} tensors"
    return Tolerance(tolerance.relative + error, told)


def in_eight_bits(tolerance: Tolerance, blocks: Sequence[int]) -> Tolerance:
    """Return the tolerance where one of the two implementations rounds what some products read to 8 bits.

    Args:
        tolerance: That of floats.
        blocks: Of each such product, how many values share a scale.
    """
    if not blocks:
        return tolerance
    error = 2 * EIGHT_BITS * math.sqrt(sum(blocks))
    told = f"{tolerance.derivation}, + 2 x sqrt({sum(blocks)}) / (127 sqrt(12)) for {len(blocks)} products in 8 bits"
    return Tolerance(tolerance.relative + error, told)


def widened(tolerance: Tolerance, layers: int, move: Callable[[float], float]) -> Tolerance:
    """Return the tolerance of outputs behind quantized activations.

    Args:
        tolerance: That of floats.
        layers: How many layers it sums up.
        move: Size of a jitter before each quantizer -> how far it moves the outputs, both relative.
    """
    eps = tolerance.relative / math.sqrt(max(layers, 1))
    moved = move(eps)
    told = f"{tolerance.derivation}, + 2 x {moved:.2e}, which jitter of {eps:.1e} before each quantizer moves them"
    return Tolerance(tolerance.relative + 2 * moved, told)


def reduction_length(weight: CodedWeight) -> int:
    """Return K, the number of products in one output of the layer that reads this weight."""
    shape: tuple[int, ...] = weight.stored.shape
    for step in weight.steps:
        shape = step.shape_after(shape)
    if weight.op in ("Conv", "ConvTranspose"):  # (K, C, R, S) or (C, K, R, S): all but the output channels
        return math.prod(shape) // max(shape[1 - weight.consumed_axis], 1)
    return shape[weight.consumed_axis]
