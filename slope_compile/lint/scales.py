"""Scales and zero points: their values, shapes, types and axes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import HEADER, RECOMMENDED, observed
from slope_compile.lint.view import CONVOLUTIONS, QUANTIZERS, Site, View

_PARAMETERS = {1: "scale", 2: "zero point"}


@rule(
    "scale-positive",
    "error",
    "Scales are finite and greater than 0",
    f'{HEADER}: "All scale coefficients must have strictly positive values"; '
    + observed("0, negative and NaN stop the parser, infinity goes through unseen"),
    "Quantize again with positive scales; a layer or channel of zeros only takes any positive scale.",
)
def scale_positive(view: View) -> Iterator[Hit]:
    """Zero, negative, infinite or NaN scales."""
    for site in _pairs_once(view):
        scale = view.array(view.input(site, 1))
        if scale is None or scale.dtype.kind != "f":
            continue
        bad = ~(np.isfinite(scale) & (scale > 0))
        if bad.any():
            first = np.unravel_index(int(np.argmax(bad)), bad.shape)
            count = f"{np.count_nonzero(bad)} of {bad.size} scales are not, the first at {[int(i) for i in first]}"
            yield Hit(site.name, f"{count}: {scale[first]}")


@rule(
    "scale-shape",
    "error",
    "Scales and zero points fit what they scale: one, one per channel of the axis, or one per block",
    f"{HEADER}: per-channel and block scales; "
    + observed("the parser says that the number of scales is not the number of channels"),
    "Quantize again: as many scales as the axis has channels or blocks.",
)
def scale_shape(view: View) -> Iterator[Hit]:
    """Scales whose shape fits neither the axis nor the blocks."""
    for site in _pairs_once(view):
        shape = quantized_shape(view, site)
        scale = view.array(view.input(site, 1))
        for index, what in _PARAMETERS.items():
            parameter = view.array(view.input(site, index))
            if parameter is None:
                continue
            if index == 2 and scale is not None and parameter.shape != scale.shape and parameter.size > 1:
                yield Hit(site.name, f"zero points of shape {parameter.shape} beside scales of shape {scale.shape}")
            elif shape is not None and (wanted := misfit(view, site, shape, parameter)) is not None:
                yield Hit(site.name, f"{what} of shape {parameter.shape} for a tensor of shape {shape}: {wanted}")


@rule(
    "computed-scale",
    "error",
    "Scales and zero points are constants",
    f'{HEADER}: "The subgraph which terminates with the scale tensor must be a build-time constant"',
    "Calibrate or train the scales, and store them as initializers.",
)
def computed_scale(view: View) -> Iterator[Hit]:
    """Scales that the graph computes as it runs."""
    for site in view.of(*QUANTIZERS):
        for index, what in _PARAMETERS.items():
            value = view.input(site, index)
            if value is not None and not view.is_constant(value):
                yield Hit(site.name, f"its {what} '{value.name}' is computed as the graph runs")


@rule(
    "zero-point",
    "error",
    "Zero points are 0",
    f'{HEADER}: "Only symmetric quantization is supported"; '
    + observed('"Non-zero zero point is not supported"')
    + "; TensorRT issues 2774, 4698",
    "Quantize symmetrically: signed integers, zero point 0 (onnxruntime: ActivationSymmetric, WeightSymmetric).",
)
def zero_point(view: View) -> Iterator[Hit]:
    """Asymmetric quantization."""
    for site in _pairs_once(view):
        zero = view.array(view.input(site, 2))
        if zero is not None and zero.any():
            span = f"{zero.min()} to {zero.max()}" if zero.size > 1 else f"{zero.reshape(())}"
            yield Hit(site.name, f"zero point {span}")


@rule(
    "scale-type",
    "warning",
    "From opset 23 on, too, a scale has the type of the floats it scales: ONNX Runtime runs nothing else",
    "github.com/microsoft/onnxruntime/issues/32719",
    "Put a Cast behind DequantizeLinear (before QuantizeLinear) instead, or store scales in the floats' type.",
)
def scale_type(view: View) -> Iterator[Hit]:
    """Scales of one type with floats of another."""
    if view.opset < 23:
        return
    for site in view.of(*QUANTIZERS):
        scale = view.dtype(view.input(site, 1))
        if site.runs("DequantizeLinear"):
            asked = view.integer(site, "output_dtype", 0)
            known = asked in TensorProto.DataType.values()
            floats = TensorProto.DataType.Name(asked) if asked and known else None
        else:
            floats = view.dtype(view.input(site, 0))
        if scale is not None and floats is not None and scale != floats:
            yield Hit(site.name, f"scale {scale}, floats {floats}")


@rule(
    "per-channel-activation",
    "error",
    "Activations have one scale",
    f'{HEADER}: "Per-channel quantization is supported only for weight inputs. Thus, Activations cannot be quantized '
    'per-channel"',
    "Quantize activations per tensor.",
)
def per_channel_activation(view: View) -> Iterator[Hit]:
    """Activations with a scale per channel."""
    for site in view.of("QuantizeLinear"):
        scale = view.array(view.input(site, 1))
        if scale is not None and scale.size > 1 and not view.is_constant(view.input(site, 0)):
            yield Hit(site.name, f"{scale.size} scales for an activation")


@rule(
    "weight-axis",
    "warning",
    "Weights beside quantized activations are scaled per output channel: axis 0 of a Conv, N of a MatMul",
    f"{RECOMMENDED}: per-tensor activations, per-channel weights; " + observed("the parser takes any axis"),
    "Quantize the weight per tensor or along its output channel: only such a scale can be applied after the products.",
)
def weight_axis(view: View) -> Iterator[Hit]:
    """Weights scaled along an axis that the operator sums over."""
    for use in view.uses:
        weight = use.weight
        if weight is None or weight.codes is None or weight.axis is None or weight.block_size:
            continue
        convolution = weight.op in CONVOLUTIONS
        if weight.axis == weight.reduction_axis and (convolution or view.is_quantized(use.activation)):
            yield Hit(use.site.name, f"'{weight.name}' {list(weight.stored.shape)} has scales along axis {weight.axis}")


def _pairs_once(view: View) -> Iterator[Site]:
    """Yield the quantizers, but for a DequantizeLinear that shares its parameters with the QuantizeLinear before it."""
    for site in view.of(*QUANTIZERS):
        value = view.input(site, 0)
        before = value.site if value is not None and site.runs("DequantizeLinear") else None
        if before is None or not before.runs("QuantizeLinear") or before.node.input[1:] != site.node.input[1:]:
            yield site


def quantized_shape(view: View, site: Site) -> tuple[int, ...] | None:
    """Return the shape of the constant that a QuantizeLinear or DequantizeLinear reads; None where it reads none."""
    value = view.input(site, 0)
    if value is not None and value.site is not None and value.site.runs("QuantizeLinear"):
        value = view.input(value.site, 0)
    return tuple(value.maker.dims) if value is not None and isinstance(value.maker, TensorProto) else None


def misfit(view: View, site: Site, shape: tuple[int, ...], parameter: npt.NDArray[np.generic]) -> str | None:
    """Say which parameters would fit a tensor; None where these do."""
    block = view.integer(site, "block_size", 0)
    if parameter.size == 1 and not block:
        return None
    asked = view.integer(site, "axis", 1)
    axis = asked + len(shape) if asked < 0 else asked
    if block < 0 or not 0 <= axis < len(shape):
        return f"there is no axis {asked} with block size {block}"
    wanted: tuple[int, ...] = (shape[axis],)
    if block:
        wanted = (*shape[:axis], -(-shape[axis] // block), *shape[axis + 1 :])
    return None if parameter.shape == wanted else f"{wanted} would fit axis {axis}, block size {block}"
