"""How far two correct implementations of one network may differ.

Letters: K - length of a reduction (input channels × kernel), u - 2^-24, the unit roundoff of float32.

Each output of a convolution or matrix product is a sum of K products. Two implementations add them in different orders.
The rounding errors of such a sum grow like a random walk, u·sqrt(K) relative to the sum of magnitudes (Higham, Accuracy
and Stability of Numerical Algorithms, 2nd ed., section 2.8), once in each implementation:

    err(layer)   = 2u·sqrt(K) = 2^-23·sqrt(K)
    err(network) = 2^-23 · Σ_layers sqrt(K)          errors of all layers with one sign: the worst case over depth

relative to the largest |output|: a logit near zero is a difference of large sums, and has their error. The margin:
errors of layers do not all have one sign. Measured between torch and ONNX Runtime, with random 4-bit weights and norms:

    ResNet-18 (21 layers)        1.4e-6 of an allowed 8.5e-5
    DeiT-tiny (50 layers)        1.1e-6 of an allowed 1.0e-4
    MobileNetV3-small (54)       8.6e-7 of an allowed 5.0e-5

An engine may multiply in TF32, and float16 weights make ONNX Runtime round each layer's output to float16. Both keep
10 bits after the leading one: + 2^-10 a layer, again with one sign over depth.

An FP16 or BF16 graph rounds every tensor to 2^-11 or 2^-8 of each element. These errors are independent of each other
and of the sums', so over n such tensors they grow like a random walk too, and a factor 2 is the margin:

    err(half) = 2u * sqrt(n)                           u = 2^-11 (FP16), 2^-8 (BF16)

Measured between a placed file in FP16 and the exported one, random 4-bit weights:

    ResNet-18 (91 tensors)            1.8e-3 of an allowed 9.4e-3
    ResNet-50 (200)                   9.8e-4 of an allowed 1.4e-2
    DeiT-tiny, 3 blocks (129)         5.9e-4 of an allowed 1.1e-2

Quantized activations: between two quantizers the bound holds as it is, and there it is applied wherever the trained
model is at hand (`steps.py`). From end to end it does not: where a value lies within an error of the middle between two
levels, the two implementations round it to different ones, and that sets off others. Where only outputs can be had, how
far rounding moves them is measured on the file itself: jitter before each quantizer, as large as the errors of all
layers would be if they were independent (`segments.py`):

    eps = err(network) / sqrt(layers)
    err(outputs) = err(network) + 2 * the outputs' largest move       two implementations, each that far from the exact

From 1 on, nothing can be told from such outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from slope_compile.qdq.reader import CodedWeight

EPS32 = 2.0**-23
EPS_TEN_BITS = 2.0**-10
ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed |difference|, relative to the largest |output| of the reference."""

    relative: float
    derivation: str


def tolerance_of(weights: Iterable[CodedWeight], ten_bits: bool = False) -> Tolerance:
    """Derive the tolerance of a network, or of its segments, from the weights that its file holds.

    Args:
        weights: What the reader found.
        ten_bits: Whether one of the two implementations may multiply in TF32.
    """
    found = list(weights)
    root_sum = sum(math.sqrt(reduction_length(weight)) for weight in found)
    relative = EPS32 * max(root_sum, 1.0)
    derivation = f"2^-23 x sum of sqrt(K) = {root_sum:.0f} over {len(found)} layers"
    if ten_bits or any(weight.value_dtype == "FLOAT16" for weight in found):
        relative += EPS_TEN_BITS * len(found)
        derivation += ", + 2^-10 a layer"
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
    shape: tuple[int, ...] = weight.consumed(weight.stored).shape
    if weight.op in ("Conv", "ConvTranspose"):  # (K, C, R, S) or (C, K, R, S): all but the output channels
        return math.prod(shape) // max(shape[1 - weight.consumed_axis], 1)
    return shape[weight.consumed_axis]
