"""Which placements a layer can have in a situation: one table of rules, each with its source.

A rule says why a placement is not possible, or nothing. What no rule forbids is possible; which of the possible ones is
taken is a question of cost (cost.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

from slope_compile.placement.layers import Layer
from slope_compile.placement.scales import default_block
from slope_compile.placement.situation import Situation
from slope_compile.recipe import Placement

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
SPARSE: tuple[Placement, ...] = ("sparse-int8", "sparse-fp16")
INT8: tuple[Placement, ...] = ("sparse-int8", "int8")
INT4: tuple[Placement, ...] = ("int4-weight", "int4-storage")
CODED: tuple[Placement, ...] = ("sparse-int8", "int8", "int4-weight", "int8-weight", "int4-storage")
FLOATS = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}

INT4_OPSET = 21  # DequantizeLinear takes INT4 and block_size since then
SPARSE_CHANNELS = 256  # input (C·R·S) and output channels from which sparse kernels are likely to win

_QUANTIZED_TYPES = "TensorRT documentation, quantized types and schemes"
_TESTED = "tried with TensorRT-RTX 1.7.1"
_SPARSITY_GUIDE = "TensorRT developer guide, structured sparsity"


@dataclass(frozen=True)
class Refusal:
    """Why something is not possible, or not likely.

    Args:
        reason: In a few words, without a full stop.
        source: Who says so.
    """

    reason: str
    source: str


@dataclass(frozen=True)
class Rule:
    """What a placement demands of a layer and its situation.

    Args:
        placements: Those it is about.
        broken: Returns why the layer does not fulfil it, or None.
        source: Who says so.
    """

    placements: tuple[Placement, ...]
    broken: Callable[[Layer, Situation], str | None]
    source: str


def refusal(placement: Placement, layer: Layer, situation: Situation) -> Refusal | None:
    """Return why a layer cannot have a placement, or None if it can.

    Args:
        placement: The one asked for.
        layer: The weight and its operators.
        situation: Who builds, and for what.
    """
    for rule in RULES:
        if placement in rule.placements and (reason := rule.broken(layer, situation)):
            return Refusal(reason, rule.source)
    return None


def possible(layer: Layer, situation: Situation) -> tuple[Placement, ...]:
    """Return the placements that a layer can have, in the order of the table; `float` always is one."""
    return tuple(placement for placement in PLACEMENTS if refusal(placement, layer, situation) is None)


def sparse_doubt(placement: Placement, layer: Layer, situation: Situation) -> Refusal | None:
    """Return why a possible sparse placement is not likely to get sparse kernels; None where it is.

    TensorRT times the kernels itself: this only decides what the cost model counts on.
    """
    if situation.backend.rtx:
        return Refusal("TensorRT-RTX chooses kernels at run time and reports none", _TESTED)
    if min(layer.reduction, layer.channels) < SPARSE_CHANNELS:
        sizes = f"{layer.reduction} products a sum and {layer.channels} output channels"
        return Refusal(
            f"{sizes}: sparse kernels win from about {SPARSE_CHANNELS} of both on", "NVIDIA/TensorRT#3849, #4065"
        )
    if placement == "sparse-int8" and not layer.quantized_output:
        reason = "its output leaves in float, and sparse INT8 kernels win only where it is quantized too"
        return Refusal(reason, "NVIDIA/Model-Optimizer PR #1664")
    if placement == "sparse-fp16" and situation.precision == "bf16":
        return Refusal("no source says that sparse BF16 kernels exist", "TensorRT developer guide names FP16 and INT8")
    return None


def storage(placement: Placement, layer: Layer, situation: Situation) -> tuple[str, int]:
    """Return the container and the block size of a possible placement.

    Args:
        placement: A possible one.
        layer: The weight.
        situation: Who takes it.
    """
    if placement == "float":
        kept = layer.bits is None and layer.stored != "FLOAT"
        return (layer.stored if kept else FLOATS[situation.precision]), 0
    if placement == "sparse-fp16":
        return FLOATS[situation.precision], 0
    if placement not in INT4:
        return "INT8", 0
    blocks = situation.backend.gemm_int4_blocks
    if placement == "int4-storage" or (blocks is None and not _fits_blocks(layer)):
        return "INT4", layer.block_size
    return "INT4", _block_size(layer)


def _block_size(layer: Layer) -> int:
    """Return the block size that a matrix gets, 0 where its scales fit none."""
    wanted = default_block(layer.reduction)
    return wanted if wanted in layer.blocks else max(layer.blocks, default=0)


def _fits_blocks(layer: Layer) -> bool:
    """Whether a matrix can be stored in blocks of 64 or 128, padded where K is no multiple."""
    block_size = _block_size(layer)
    return bool(block_size) and (layer.plain or not is_padded(layer, block_size))


def is_padded(layer: Layer, block_size: int) -> bool:
    """Whether K is no multiple of the block, so that codes and activation get zeros behind their end."""
    return bool(block_size) and layer.reduction % block_size != 0


def _not_coded(layer: Layer, situation: Situation) -> str | None:
    return f"it is stored as {layer.stored}, not as codes" if layer.bits is None else None


def _zero_point(layer: Layer, situation: Situation) -> str | None:
    return "its zero points are not 0" if layer.zero_points else None


def _too_wide(layer: Layer, situation: Situation) -> str | None:
    bits = layer.bits or 0
    return f"its codes need {bits} signed bits" if bits > 8 else None


def _wider_than_4(layer: Layer, situation: Situation) -> str | None:
    bits = layer.bits or 0
    return f"its codes need {bits} bits" if bits > 4 else None


def _no_int4(layer: Layer, situation: Situation) -> str | None:
    return None if "INT4" in situation.target.types else f"{situation.target.devices} takes no INT4 weights"


def _old_opset(layer: Layer, situation: Situation) -> str | None:
    if layer.opset >= INT4_OPSET:
        return None
    return f"the file has opset {layer.opset}, and DequantizeLinear takes INT4 since {INT4_OPSET}"


def _float_input(layer: Layer, situation: Situation) -> str | None:
    return None if layer.quantized_input else "its activation is not quantized"


def _int8_input(layer: Layer, situation: Situation) -> str | None:
    if not layer.any_quantized_input:
        return None
    return "its operator reads an INT8 activation, and multiplies INT8 with INT8"


def _all_int8(layer: Layer, situation: Situation) -> str | None:
    return "its activation is INT8, so the product is too: that is `int8`" if layer.quantized_input else None


def _dense(layer: Layer, situation: Situation) -> str | None:
    return None if layer.sparse else "its codes are not 2:4"


def _grouped(layer: Layer, situation: Situation) -> str | None:
    return f"a convolution of {layer.groups} groups gets no sparse kernel" if layer.groups > 1 else None


def _transposed(layer: Layer, situation: Situation) -> str | None:
    return "sparse kernels are for Conv and matrix products" if layer.op == "ConvTranspose" else None


def _no_sparse_cores(layer: Layer, situation: Situation) -> str | None:
    return None if situation.target.sparse_speedup > 1 else f"{situation.target.devices} has no sparse tensor cores"


def _fp32(layer: Layer, situation: Situation) -> str | None:
    return "activations are FP32, and sparse kernels take FP16 or INT8" if situation.precision == "fp32" else None


def _rtx(layer: Layer, situation: Situation) -> str | None:
    return "TensorRT-RTX says of no kernel whether it is sparse" if situation.backend.rtx else None


def _not_gemm(layer: Layer, situation: Situation) -> str | None:
    return None if layer.is_gemm else f"{situation.backend.title} has no INT4 {layer.op} that is fused"


def _gemm(layer: Layer, situation: Situation) -> str | None:
    return "the 4-bit weight of a matrix product is `int4-weight`" if layer.is_gemm else None


def _no_conv_int4(layer: Layer, situation: Situation) -> str | None:
    return None if situation.backend.conv_int4 else f"{situation.backend.title} has no INT4 convolution"


def _odd_conv(layer: Layer, situation: Situation) -> str | None:
    if layer.elements % 2 == 0:
        return None
    return f"4-bit tensors must have an even number of elements, and it has {layer.elements}"


def _block_shapes(layer: Layer, situation: Situation) -> str | None:
    blocks, title = situation.backend.gemm_int4_blocks, situation.backend.title
    as_stored = (blocks is None and layer.elements % 2 == 0) or layer.block_size in (blocks or ())
    if not as_stored and not layer.blocks:
        return f"{title} takes INT4 in blocks of 64 or 128 along K, and its scales fit neither"
    if is_padded(layer, storage("int4-weight", layer, situation)[1]) and not layer.plain:
        return f"{title} takes INT4 in whole blocks along K, and a factor so reshaped cannot be padded to them"
    return None


def _blocks_in_8_bits(layer: Layer, situation: Situation) -> str | None:
    if layer.per_row:
        return None
    return f"its scales differ from block to block ({layer.block_size}), and 8-bit weights have one per channel"


def _turing_gemm(layer: Layer, situation: Situation) -> str | None:
    if situation.backend.rtx and layer.is_gemm and "INT4" not in situation.target.types:
        return f"TensorRT-RTX takes no INT8 weights in a matrix product on {situation.target.devices}"
    return None


# In the order in which they are told: the first one that is broken is the reason.
RULES: tuple[Rule, ...] = (
    Rule(CODED, _not_coded, "nothing quantizes weights after training"),
    Rule(CODED, _zero_point, "NvInfer.h, IDequantizeLayer: only symmetric quantization"),
    Rule(CODED, _too_wide, "ONNX importer: UINT8 is read as INT8"),
    Rule(INT8, _float_input, "NvInfer.h, IQuantizeLayer: INT8 products need both factors quantized"),
    Rule(("int8-weight",), _all_int8, "NVIDIA/Model-Optimizer#3: Q/DQ on both inputs makes INT8 kernels"),
    Rule(("sparse-fp16", *INT4), _int8_input, f"{_TESTED}: INT4 conv weights beside INT8 activations fail to build"),
    Rule(SPARSE, _dense, _SPARSITY_GUIDE),
    Rule(SPARSE, _grouped, "NVIDIA/TensorRT#4054"),
    Rule(SPARSE, _transposed, _SPARSITY_GUIDE),
    Rule(SPARSE, _no_sparse_cores, "the vendor's data sheets, targets.yaml"),
    Rule(("sparse-fp16",), _fp32, _SPARSITY_GUIDE),
    Rule(("sparse-fp16",), _rtx, f"{_TESTED}: no (Sparsity) lines, and plans of the same size"),
    Rule(("int4-weight",), _not_gemm, f"{_QUANTIZED_TYPES}; NVIDIA/Model-Optimizer#178"),
    Rule(("int4-storage",), _gemm, _QUANTIZED_TYPES),
    Rule(("int4-storage",), _no_conv_int4, "NVIDIA/Model-Optimizer#178"),
    Rule(INT4, _wider_than_4, "ONNX: INT4 holds -8 to 7"),
    Rule(INT4, _no_int4, "TensorRT support matrix, hardware and precision"),
    Rule(INT4, _old_opset, "ONNX operators, DequantizeLinear-21"),
    Rule(("int4-storage",), _odd_conv, f"{_TESTED}: sub-byte quantization with odd tensor volume is not supported"),
    Rule(("int4-weight",), _block_shapes, _QUANTIZED_TYPES),
    Rule((*INT8, "int8-weight", "int4-storage"), _blocks_in_8_bits, "NvInfer.h: block quantization for FP4, FP8, INT4"),
    Rule(("int8-weight",), _turing_gemm, "TensorRT-RTX support matrix"),
)
