"""Versions of the ONNX operators: what a file's opset allows."""

from __future__ import annotations

from collections.abc import Iterator

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import ONNX, observed
from slope_compile.lint.view import QUANTIZERS, Site, View

NEWEST = 28  # onnx 1.23.2
_SINCE = {
    "UINT4": 21, "INT4": 21, "FLOAT4E2M1": 23, "UINT2": 25, "INT2": 25,
    "FLOAT8E4M3FN": 19, "FLOAT8E4M3FNUZ": 19, "FLOAT8E5M2": 19, "FLOAT8E5M2FNUZ": 19, "FLOAT8E8M0": 24,
}  # fmt: skip


@rule(
    "opset-too-old",
    "error",
    "The file's opset has what its quantizers use: scales per channel from 13, FP16 scales from 19, INT4 and blocks "
    "from 21, FP4 from 23, INT2 from 25",
    f"{ONNX}/onnx__DequantizeLinear.html, versions; onnx.checker and ONNX Runtime refuse the file",
    "Convert the model to opset 21 (onnx.version_converter) before it is quantized, or export it so.",
)
def opset_too_old(view: View) -> Iterator[Hit]:
    """Quantizers that use what their opset does not have."""
    for site in view.of(*QUANTIZERS):
        for what, since in _needs(view, site):
            if view.opset < since:
                yield Hit(site.name, f"{what} need opset {since}; the file has {view.opset or 'none'}")


@rule(
    "opset-too-new",
    "warning",
    f"The file's opset is one that the parser was made for, at most {NEWEST}",
    observed("the parser reads a later opset by the rules that it knows") + f"; onnx 1.23.2 ends at {NEWEST}",
    "Export with opset 21.",
)
def opset_too_new(view: View) -> Iterator[Hit]:
    """Opsets that nobody knows yet."""
    if view.opset > NEWEST:
        yield Hit("graph", f"opset {view.opset}")


def _needs(view: View, site: Site) -> Iterator[tuple[str, int]]:
    """Yield what a quantizer uses, and the opset that brought it."""
    yield f"{site.node.op_type} nodes", 10
    scale = view.array(view.input(site, 1))
    blocks = view.integer(site, "block_size", 0)
    if scale is not None and scale.size > 1 and not blocks:
        yield "scales per channel", 13
    if view.dtype(view.input(site, 1)) in ("FLOAT16", "BFLOAT16"):
        yield "FLOAT16 and BFLOAT16 scales", 19
    if blocks:
        yield "scales per block", 21
    integers = view.output(site) if site.runs("QuantizeLinear") else view.input(site, 0)
    dtype = view.dtype(integers) or ""
    if dtype in _SINCE:
        yield f"{dtype} tensors", _SINCE[dtype]
