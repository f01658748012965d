"""Weights that are no constants, or that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.scales import misfit, quantized_shape
from slope_compile.lint.sources import EXPLICIT, SPARSITY, observed
from slope_compile.lint.view import QUANTIZERS, View


@rule(
    "computed-weight",
    "warning",
    "The weight of a Conv, ConvTranspose or Gemm is a constant",
    f"{EXPLICIT}: weights are constants before Q/DQ; {SPARSITY}; " + observed("a Conv builds whose weight is an input"),
    "Store the weight as an initializer: a computed one is never sparse, and its scale cannot be read.",
)
def computed_weight(view: View) -> Iterator[Hit]:
    """Weights that depend on an input of the model, or are computed from constants."""
    for use in view.uses:
        if use.weight is not None or use.problem is not None or use.site.runs("MatMul"):
            continue
        value = view.input(use.site, 1)
        if value is not None:
            how = "from constants as the graph runs" if view.is_constant(value) else "as the graph runs"
            yield Hit(use.site.name, f"its weight '{value.name}' is computed {how}")


@rule(
    "quantized-at-run-time",
    "warning",
    "Weights are stored as integers",
    f"{EXPLICIT}: pre-quantized weights need a DequantizeLinear only; TensorRT folds the rest",
    "Store the integers: the file is a quarter of the size (an eighth for INT4), and what it holds can be verified.",
)
def quantized_at_run_time(view: View) -> Iterator[Hit]:
    """Float weights with Q/DQ behind them."""
    for use in view.uses:
        for index in (0, 1):
            found = view.dequantized(view.input(use.site, index))
            if found is not None and found.constant and found.quantize is not None:
                floats = view.input(found.quantize, 0)
                yield Hit(use.site.name, f"its weight '{floats.name if floats else ''}' is stored as floats")


@rule(
    "malformed-weight",
    "error",
    "Every weight can be read, from the operator back to the bytes",
    "slope-compile: Conv, ConvTranspose, Gemm and MatMul weights through DequantizeLinear, Cast, Transpose and Reshape",
    "Export the model again.",
)
def malformed_weight(view: View) -> Iterator[Hit]:
    """Weights that the reader refuses, for a reason that no rule on scales names."""
    named = any(_misfits(view))
    for use in view.uses:
        if use.problem is not None and not (named and " has a scale of shape " in use.problem):
            yield Hit(use.site.name, use.problem.rstrip("."))


def _misfits(view: View) -> Iterator[bool]:
    for site in view.of(*QUANTIZERS):
        shape, scale = quantized_shape(view, site), view.array(view.input(site, 1))
        yield shape is not None and scale is not None and misfit(view, site, shape, scale) is not None
