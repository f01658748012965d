"""How far each layer's output is off, from end to end: the rows of a heat map, had in few runs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slope_compile.verify.bisect.distance import relative_error
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.points import Key, Side, groups, matched
from slope_compile.verify.bisect.search import BUDGET, first_samples
from slope_compile.verify.chain.runners import Array, Arrays
from slope_compile.verify.parity.tolerance import EPS32, Tolerance

SAMPLES = 2


@dataclass(frozen=True)
class LayerError:
    """One layer of one hop.

    Args:
        name: `layer1.0.conv1`.
        operator: Conv, ConvTranspose, MatMul or Gemm; of two torch models, the class of the module.
        relative: max|difference| / max|reference| of its output; the worst of its calls.
        allowed: How much floats explain: of the layers up to this one, and whatever else the hop allows.
    """

    name: str
    operator: str
    relative: float
    allowed: float


def layer_errors(
    reference: Side, tested: Side, feed: Arrays, allowed: Tolerance, budget: int = BUDGET
) -> list[LayerError]:
    """Return the error of every layer that both sides have, in the order in which the tested side runs them.

    From end to end, but for quantized activations: there the tested file is given the reference's integers at each
    quantizer, since rounding sets off rounding (`segments.py`).

    Args:
        reference: One side.
        tested: The other.
        feed: Inputs; the first two samples are run.
        allowed: What the hop allows of the outputs.
        budget: Bytes of tensors held of each side at a time.
    """
    feed = first_samples(reference, tested, feed, SAMPLES)
    sizes = reference.keys(feed)
    both = matched(sizes, tested.keys(feed))
    outputs = [key for key in both if key.role in ("output", "product") and tested.length(key.name)]
    outputs = list({(key.name, key.call): key for key in outputs}.values())  # with the bias, where both are there
    integers = [key for key in both if key.role == "quantizer"] if isinstance(tested, OnnxSide) else []
    errors: dict[str, float] = {}
    for group in groups([sizes[key] for key in outputs], budget):
        keys = [outputs[index] for index in group]
        expected = reference.values(feed, [*keys, *integers])
        found = _tested(tested, feed, keys, {key: expected[key] for key in integers})
        for key in keys:
            error = relative_error(expected[key], found[key])
            errors[key.name] = max(error, errors.get(key.name, 0.0))
    return _rows(tested, errors, allowed)


def _tested(tested: Side, feed: Arrays, keys: list[Key], given: dict[Key, Array]) -> dict[Key, Array]:
    """Return the tested side's tensors; integers of quantizers, where there are any, are given to it."""
    if not given or not isinstance(tested, OnnxSide):
        return tested.values(feed, keys)
    place = tested.graph.keys
    found = tested.compute(feed, {place[key]: array for key, array in given.items()}, [place[key] for key in keys])
    return {key: found[place[key]] for key in keys}


def _rows(tested: Side, errors: dict[str, float], allowed: Tolerance) -> list[LayerError]:
    """Return the rows, each with what the layers up to it sum up: 2^-23 sqrt(K) each (`tolerance.py`)."""
    roots = {name: EPS32 * math.sqrt(tested.length(name)) for name in errors}
    beside = max(allowed.relative - sum(roots.values()), 0.0)  # half precision, TF32: not split among the layers
    rows, so_far = [], 0.0
    for name, error in errors.items():
        so_far += roots[name]
        rows.append(LayerError(name, tested.operator(name), error, min(so_far + beside, allowed.relative)))
    return rows
