"""Where QuantizeLinear and DequantizeLinear stand, so that TensorRT can fuse them into INT8 kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import EXPLICIT, RECOMMENDED, issue
from slope_compile.lint.view import Site, Use, Value, View
from slope_compile.qdq.epilogue import EPILOGUE
from slope_compile.qdq.graph import MULTIPLIES

_POOLS = ("AveragePool", "GlobalAveragePool")


@rule(
    "half-quantized",
    "warning",
    "Both factors of a Conv, Gemm or MatMul are quantized, or neither",
    f"{RECOMMENDED}: quantize all inputs of weighted operations",
    "Quantize the other factor too, or take the quantizer away: with one of them the layer multiplies floats.",
)
def half_quantized(view: View) -> Iterator[Hit]:
    """Layers with one quantized factor, in a model that quantizes activations."""
    if not view.quantizes_activations:
        return
    for use in view.uses:
        if use.problem is not None or use.activation is None:
            continue
        if not _constant_factor(view, use):
            factors = [view.is_quantized(view.input(use.site, index)) for index in (0, 1)]
            if factors.count(True) == 1:
                yield Hit(use.site.name, "one of its two activations is quantized")
            continue
        quantized = view.is_quantized(use.activation)
        if quantized and not _coded(view, use):
            dtype = use.weight.dtype if use.weight is not None else "floats"
            yield Hit(use.site.name, f"its activation is quantized, its weight is stored as {dtype}")
        elif not quantized and _coded(view, use):
            yield Hit(use.site.name, "its weight is quantized, its activation is not")


@rule(
    "residual-add",
    "warning",
    "The skip branch of a residual Add beside a quantized layer is quantized",
    f"{RECOMMENDED}: quantize residual inputs in skip connections; {issue(1992)}: without it the Add runs in "
    "FP16 or FP32",
    "Put QuantizeLinear and DequantizeLinear on the other branch of the Add.",
)
def residual_add(view: View) -> Iterator[Hit]:
    """Residual additions that fall back to floats."""
    if not view.quantizes_activations:
        return
    for site in view.of("Add"):
        sides = [view.input(site, 0), view.input(site, 1)]
        if any(side is None or view.is_constant(side) for side in sides) or not _reaches_quantizer(view, site):
            continue  # a bias, or a sum that goes on in floats anyway (the residual stream of a transformer)
        quantized = [view.is_quantized(side) for side in sides]
        layers = [_of_quantized_layer(view, side) for side in sides]
        if not any(quantized) and any(layers):
            yield Hit(site.name, "neither side is quantized, though a quantized layer is added")
        elif any(quantized) and not all(quantized) and not layers[quantized.index(False)]:
            yield Hit(site.name, "one side is quantized, the other is the float output of no quantized layer")


@rule(
    "concat-scales",
    "warning",
    "All inputs of a Concat are quantized, with one scale",
    f"slope-compile: a Concat moves values, so it stays in INT8 without a reformat only where all have one scale; "
    f"asked in {issue(3861)}, {issue(4401)}",
    "Give the inputs one scale, or quantize behind the Concat only.",
)
def concat_scales(view: View) -> Iterator[Hit]:
    """Concatenations of different scales."""
    for site in view.of("Concat"):
        found = [view.dequantized(value) for value in _joined(view, site)]
        quantized = [one for one in found if one is not None]
        if not quantized:
            continue
        if len(quantized) < len(found):
            yield Hit(site.name, f"{len(quantized)} of {len(found)} inputs are quantized")
            continue
        scales = [view.array(view.input(one.dequantize, 1)) for one in quantized]
        known = [scale for scale in scales if scale is not None]
        if any(not np.array_equal(scale, known[0]) for scale in known):
            singles = sorted({f"{float(scale.reshape(-1)[0]):.4g}" for scale in known if scale.size})
            yield Hit(site.name, f"its inputs have the scales {', '.join(singles)}")


@rule(
    "average-pool",
    "warning",
    "An AveragePool beside quantized layers has Q/DQ on both sides",
    f"{EXPLICIT}, Q/DQ propagation: an average pool is quantized by fusion with the DQ before and the Q behind it",
    "Quantize what it reads and what it makes.",
)
def average_pool(view: View) -> Iterator[Hit]:
    """Pools that fall back to floats."""
    if not view.quantizes_activations:
        return
    for site in view.of(*_POOLS):
        before = view.is_quantized(view.input(site, 0))
        after = any(user.runs("QuantizeLinear") for user in view.after(site))
        if before and after:
            continue
        if before or after or _of_quantized_layer(view, view.input(site, 0)):
            sides = "neither side" if not before and not after else "its output" if before else "its input"
            yield Hit(site.name, f"{sides} is {'' if sides == 'neither side' else 'not '}quantized")


@rule(
    "inside-fusion",
    "warning",
    "No quantizer between a weighted layer and its BatchNormalization or Relu",
    f"{RECOMMENDED}: do not simulate batch normalization and ReLU fusions",
    "Quantize behind the Relu; fold the batch norm.",
)
def inside_fusion(view: View) -> Iterator[Hit]:
    """Quantizers that keep layers from being fused."""
    for use in view.uses:
        for quantizer in (user for user in view.users(use.site) if user.runs("QuantizeLinear")):
            for dequantizer in (user for user in view.users(quantizer) if user.runs("DequantizeLinear")):
                for user in view.users(dequantizer):
                    if user.runs("BatchNormalization", "Relu"):
                        yield Hit(quantizer.name, f"stands between '{use.site.name}' and the {user.node.op_type}")


@rule(
    "double-quantized",
    "warning",
    "Nothing is quantized twice",
    "slope-compile: a second pair rounds again, and a reformat stands between two scales",
    "Take one of the two pairs away.",
)
def double_quantized(view: View) -> Iterator[Hit]:
    """QuantizeLinear right behind DequantizeLinear."""
    for site in view.of("QuantizeLinear"):
        value = view.input(site, 0)
        found = view.dequantized(value)
        if found is None or value is None:
            continue
        mine, other = view.array(view.input(site, 1)), view.array(view.input(found.dequantize, 1))
        same = mine is not None and other is not None and np.array_equal(mine, other)
        if not same or value.site is None or value.site.runs("DequantizeLinear"):  # a move between equal pairs is exact
            yield Hit(site.name, f"quantizes what '{found.dequantize.name}' has just dequantized")


@rule(
    "unpaired-quantize",
    "warning",
    "Behind every QuantizeLinear stands a DequantizeLinear",
    f"{EXPLICIT}: TensorRT fuses a layer with DQ before and Q behind it; integers that are cast or computed with are "
    "no quantized activation",
    "Dequantize with the same scale before the next operator: TensorRT takes the pair out again.",
)
def unpaired_quantize(view: View) -> Iterator[Hit]:
    """Quantized values that something else than DequantizeLinear reads."""
    for site in view.of("QuantizeLinear"):
        users = view.after(site, "MaxPool")
        others = sorted({f"{user.node.op_type}" for user in users if not user.runs("DequantizeLinear")})
        if others:
            yield Hit(site.name, f"its integers are read by {', '.join(others)}")
        elif not users:
            yield Hit(site.name, "nothing dequantizes what it makes")


def _joined(view: View, site: Site) -> Iterator[Value]:
    """Yield what a Concat joins but for constants, Concats among it looked into: each value once."""
    pending, seen = [site], set[tuple[int, str]]()
    while pending:
        concat = pending.pop()
        for value in (view.input(concat, index) for index in range(len(concat.node.input))):
            joined = view.before(value)
            if value is None or joined is None or joined.key in seen:
                continue
            seen.add(joined.key)
            if joined.site is not None and joined.site.runs("Concat"):
                pending.append(joined.site)
            elif not view.is_constant(_repeated(view, joined)):
                yield value


def _repeated(view: View, value: Value) -> Value | None:
    """Return what an Expand repeats, such as a class token once an image; any other value as it is."""
    return view.input(value.site, 0) if value.site is not None and value.site.runs("Expand") else value


def _constant_factor(view: View, use: Use) -> bool:
    if use.weight is not None:
        return True
    factors = [view.input(use.site, index) for index in (0, 1)]
    return any(factor is not None and view.is_constant(factor) for factor in factors)


def _coded(view: View, use: Use) -> bool:
    """Whether the constant factor is dequantized."""
    factors = [view.input(use.site, index) for index in (0, 1)]
    found = [view.dequantized(factor) for factor in factors]
    return (use.weight is not None and use.weight.codes is not None) or any(
        one is not None and one.constant for one in found
    )


def _of_quantized_layer(view: View, value: Value | None) -> bool:
    """Whether a value comes from a layer whose activation is quantized, through what TensorRT fuses with it."""
    for _ in range(8):
        value = view.before(value)
        site = value.site if value is not None else None
        if site is None:
            return False
        if site.runs(*MULTIPLIES):
            return any(view.is_quantized(view.input(site, index)) for index in (0, 1))
        if not site.runs(*EPILOGUE):
            return False
        computed = [i for i in range(len(site.node.input)) if not view.is_constant(view.input(site, i))]
        value = view.input(site, computed[0]) if computed else None
    return False


def _reaches_quantizer(view: View, site: Site) -> bool:
    """Whether anything that reads a layer's output, behind what TensorRT fuses with the layer, is a QuantizeLinear."""
    return any(user.runs("QuantizeLinear") for user in view.after(site, *EPILOGUE))
