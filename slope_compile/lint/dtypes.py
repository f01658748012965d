"""Element types: which the parser imports, which the target has, which go together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import PARSER, QUANTIZED_TYPES, observed
from slope_compile.lint.view import CONVOLUTIONS, Site, Use, View
from slope_compile.qdq.graph import MULTIPLIES
from slope_compile.qdq.tensors import dtype_name

INT8_MAX = 127
_WIDE = frozenset({"INT16", "UINT16"})
_SUB_BYTE = ("INT2", "UINT2", "INT4", "UINT4")
# Types that some GPUs lack; the parser casts DOUBLE to FLOAT, and every target holds the others.
_OPTIONAL = frozenset(
    {
        "FLOAT16", "BFLOAT16", "INT8", "INT4", "FLOAT4E2M1", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2",
        "FLOAT8E5M2FNUZ", "FLOAT8E8M0",
    }
)  # fmt: skip


@rule(
    "uint8",
    "error",
    "Integers are INT8: UINT8 is read as INT8, so that 128 to 255 are clipped at 127",
    f"{PARSER}, " + observed("a warning that UINT8 zero points default to INT8; UINT8 tensors stop the parser"),
    "Quantize to INT8 with zero point 0; for values that are never negative, to 7 bits (0 to 127).",
)
def uint8(view: View) -> Iterator[Hit]:
    """UINT8 activations and weights."""
    for site in view.of("QuantizeLinear"):
        if view.dtype(view.output(site)) == "UINT8" and not _stays_below_128(view, site):
            yield Hit(site.name, "quantizes to UINT8")
    for site in view.of("DequantizeLinear"):
        value = view.input(site, 0)
        made = value.site if value is not None else None
        if value is not None and not (made and made.runs("QuantizeLinear")) and view.dtype(value) == "UINT8":
            yield Hit(site.name, f"dequantizes the UINT8 tensor '{value.name}'", mended=value.name in view.movable)


@rule(
    "narrow-type",
    "error",
    "No INT2, UINT2, UINT4, INT16 or UINT16: no TensorRT imports them",
    observed('"Failed to import initializer"') + f"; {QUANTIZED_TYPES} lists INT8, INT4, FP8 and FP4",
    "Store the codes as INT4 or INT8 with zero point 0: the same numbers, the same scale.",
)
def narrow_type(view: View) -> Iterator[Hit]:
    """Integer types that the parser does not know."""
    refused = view.situation.backend.cannot_import | _WIDE
    for tensor in view.tensors:
        dtype = dtype_name(tensor)
        if dtype in refused:
            name = f"{tensor.name}"
            yield Hit(name, f"{dtype} {list(tensor.dims)}", mended=name in view.movable)


@rule(
    "target-type",
    "error",
    "The target has the type",
    "TensorRT support matrix, hardware and precision; "
    + observed('"Cannot compile for target(s) sm80, because the model contains HW-specific datatypes: fp8_e4m3"'),
    "Quantize to a type that the target has, or choose another target.",
)
def target_type(view: View) -> Iterator[Hit]:
    """FP8, FP4, BF16 where the GPU has none."""
    target = view.situation.target
    lacking: dict[str, list[str]] = defaultdict(list)
    for tensor in view.tensors:
        dtype = dtype_name(tensor)
        if dtype in _OPTIONAL and dtype not in target.types:
            lacking[dtype].append(f"{tensor.name}")
    for site in view.of("Cast", "QuantizeLinear"):
        made = view.dtype(view.output(site))
        if made in _OPTIONAL and made not in target.types:
            lacking[made].append(site.name)
    for dtype, names in sorted(lacking.items()):
        more = f", in {len(names)} places" if len(names) > 1 else ""
        mended = all(name in view.movable for name in names)
        yield Hit(names[0], f"{target} has no {dtype}{more}", mended)


@rule(
    "odd-count",
    "error",
    "Tensors of less than a byte an element have an even number of them",
    observed('"Sub-byte quantization with odd tensor volume is not supported"'),
    "Store such a tensor as INT8.",
)
def odd_count(view: View) -> Iterator[Hit]:
    """Odd 2- and 4-bit tensors."""
    for tensor in view.tensors:
        elements = math.prod(tensor.dims)
        if dtype_name(tensor) in _SUB_BYTE and elements % 2 and len(tensor.dims):
            name = f"{tensor.name}"
            detail = f"{dtype_name(tensor)} {list(tensor.dims)}: {elements} elements"
            yield Hit(name, detail, mended=name in view.movable)


@rule(
    "int32-dequantize",
    "error",
    "DequantizeLinear reads no INT32: a bias stays in floats",
    observed('"input has type Int32 but must have type FP8, FP4, Int4, Int8, or UInt8"')
    + "; github.com/microsoft/onnxruntime/issues/14229",
    "Store the bias as floats (onnxruntime.quantization: extra_options={'QuantizeBias': False}).",
)
def int32_dequantize(view: View) -> Iterator[Hit]:
    """Biases as INT32 with a DequantizeLinear."""
    for site in view.of("DequantizeLinear"):
        value = view.input(site, 0)
        if value is not None and view.dtype(value) == "INT32":
            yield Hit(site.name, f"dequantizes the INT32 tensor '{value.name}'")


@rule(
    "int4-conv",
    "error",
    "TensorRT has no convolution with INT4 weights",
    "github.com/NVIDIA/Model-Optimizer/issues/178: no plan for it; Model-Optimizer examples/torch_onnx: "
    '"TensorRT only supports FP8 and INT8 for convolution operations"',
    "Store the weight as INT8: the same codes, the same scales.",
)
def int4_conv(view: View) -> Iterator[Hit]:
    """INT4 convolutions with float activations."""
    if view.situation.backend.conv_int4:
        return
    for use, name in _int4(view, *CONVOLUTIONS):
        if not view.is_quantized(use.activation):
            yield Hit(use.site.name, f"'{name}' is INT4", mended=use.movable)


@rule(
    "int4-int8-input",
    "error",
    "A layer that reads INT8 has INT8 weights",
    observed(
        'INT4 weights of a convolution with INT8 activations end the build: "CHECK(dtype == W.type()) failed"; those '
        "of a matrix product do not, and slope-compile places them as INT8 all the same"
    ),
    "Store the weight as INT8: the same codes, the same scales.",
)
def int4_int8_input(view: View) -> Iterator[Hit]:
    """INT4 weights beside quantized activations."""
    for use, name in _int4(view, *MULTIPLIES):
        if view.is_quantized(use.activation):
            yield Hit(use.site.name, f"'{name}' is INT4, its activation is quantized", mended=use.movable)


@rule(
    "mixed-factors",
    "error",
    "A strongly typed network multiplies floats of one type",
    observed('"IMatrixMultiplyLayer must have same input types. A is of type Float and B is of type Half"')
    + "; onnx.ai/onnx/operators: both inputs are of type T",
    "Put a Cast before the operator, or give the scales the type of the activations.",
)
def mixed_factors(view: View) -> Iterator[Hit]:
    """FLOAT times FLOAT16."""
    for use in view.uses:
        types = [view.dtype(view.input(use.site, index)) for index in (0, 1)]
        if None not in types and types[0] != types[1]:
            yield Hit(use.site.name, f"multiplies {types[0]} with {types[1]}")


def _int4(view: View, *ops: str) -> Iterator[tuple[Use, str]]:
    for use in view.uses:
        if use.weight is not None and use.weight.op in ops and use.weight.dtype == "INT4":
            yield use, use.weight.name


def _stays_below_128(view: View, site: Site) -> bool:
    """Whether a Clip before the quantizer keeps its integers within INT8."""
    value = view.before(view.input(site, 0))
    clip = value.site if value is not None else None
    if clip is None or not clip.runs("Clip"):
        return False
    highest, scale = view.array(view.input(clip, 2)), view.array(view.input(site, 1))
    if highest is None or scale is None or highest.size != 1 or scale.size != 1 or not scale.reshape(()) > 0:
        return False
    with np.errstate(all="ignore"):
        return bool(highest.reshape(()) / scale.reshape(()) < INT8_MAX + 0.5)
