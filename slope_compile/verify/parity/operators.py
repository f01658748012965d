"""Operators of a file besides the coded layers: how long their sums are, and of which that is not known.

The laws' reader knows a weight by the operator that multiplies with it. Files of other tools have operators of ONNX
Runtime's own, and quantized ones, that do their products inside.
"""

from __future__ import annotations

from pathlib import Path

from slope_compile.verify.chain.live_nodes import live_nodes

ONNX_OWN = ("", "ai.onnx")
MICROSOFT = "com.microsoft"
_FLOAT32 = 1  # accuracy_level of a MatMulNBits: 0, the default, and 1 multiply in float32, others in fewer bits
_UNBOUNDED = {
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "DynamicQuantizeLinear",  # they round to steps
    "LSTM", "GRU", "RNN", "Einsum", "DeformConv", "Attention",  # they multiply with what the reader does not read
}  # fmt: skip
_NO_PRODUCTS = {
    "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "BiasAdd", "BiasSplitGelu", "SkipLayerNormalization", "NhwcMaxPool",
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RotaryEmbedding", "DequantizeLinear",
    "QuantizeLinear",
}  # fmt: skip


def products_in_bits(onnx: Path) -> list[int]:
    """Return K, the number of products in one output, of each MatMulNBits."""
    return [
        live.scope.integer(live.node, "K", 1)
        for live in live_nodes(onnx)
        if live.node.op_type == "MatMulNBits" and live.node.domain == MICROSOFT
    ]


def unknown_operators(onnx: Path) -> list[str]:
    """Return the operators that an output depends on and whose rounding has no bound here, in words."""
    found: dict[str, None] = {}  # in the file's order
    for live in live_nodes(onnx):
        kind, domain = live.node.op_type, live.node.domain
        if domain in ONNX_OWN:
            known = kind not in _UNBOUNDED
        elif kind == "MatMulNBits" and domain == MICROSOFT:
            known = live.scope.integer(live.node, "accuracy_level", 0) <= _FLOAT32
        else:
            known = domain == MICROSOFT and kind in _NO_PRODUCTS
        if not known:
            found[kind if domain in ONNX_OWN else f"{domain}.{kind}"] = None
    return list(found)
