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

Quantized activations: where a value lies within such an error of the middle between two levels, the two round it to
different ones. A share f of the integers may differ so by a level (`steps.py` counts them): noise of power f·s² beside
a signal of power <v²>. LSQ starts with s = 2<|v|>/sqrt(Qp), and <|v|>² <= <v²>, so s²/<v²> is about 4/Qp at most:

    err(network) += sqrt(f · Σ_quantizers 4/Qp)      independent errors of all quantizers, each passed on undamped

With f = 1/100 that is 0.09 for ResNet-18 at 8 bits. A wrong step hides below it, so the integers themselves are
compared too wherever the trained model is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from slope_compile.qdq.activations import StoredQuantizer
from slope_compile.qdq.reader import CodedWeight

EPS32 = 2.0**-23
EPS_TEN_BITS = 2.0**-10
FLIPPED = 0.01  # f


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed |difference|, relative to the largest |output| of the reference."""

    relative: float
    derivation: str


def tolerance_of(
    weights: Iterable[CodedWeight], ten_bits: bool = False, quantizers: Iterable[StoredQuantizer] = ()
) -> Tolerance:
    """Derive the tolerance of a network from the weights that its file holds.

    Args:
        weights: What the reader found.
        ten_bits: Whether one of the two implementations may multiply in TF32.
        quantizers: The quantizers of activations that the file holds.
    """
    found = list(weights)
    root_sum = sum(math.sqrt(reduction_length(weight)) for weight in found)
    relative = EPS32 * max(root_sum, 1.0)
    derivation = f"2^-23 x sum of sqrt(K) = {root_sum:.0f} over {len(found)} layers"
    if ten_bits or any(weight.value_dtype == "FLOAT16" for weight in found):
        relative += EPS_TEN_BITS * len(found)
        derivation += ", + 2^-10 a layer"
    if steps := [4 / max(quantizer.high, 1) for quantizer in quantizers]:
        relative += math.sqrt(FLIPPED * sum(steps))
        derivation += (
            f", + sqrt({FLIPPED} x sum of 4/Qp = {sum(steps):.2f}) over {len(steps)} quantizers of activations"
        )
    return Tolerance(relative, derivation)


def reduction_length(weight: CodedWeight) -> int:
    """Return K, the number of products in one output of the layer that reads this weight."""
    shape: tuple[int, ...] = weight.consumed(weight.stored).shape
    if weight.op in ("Conv", "ConvTranspose"):  # (K, C, R, S) or (C, K, R, S): all but the output channels
        return math.prod(shape) // max(shape[1 - weight.consumed_axis], 1)
    return shape[weight.consumed_axis]
