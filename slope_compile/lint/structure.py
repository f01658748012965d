"""Operators, domains, shapes and names of the graph."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

import onnx
from onnx import AttributeProto

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.sources import ONNX, observed
from slope_compile.lint.view import Site, View

# OnnxParser.supports_operator of TensorRT-RTX 1.7.1 says no
UNKNOWN_TO_PARSER = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
        "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT", "DeformConv",
        "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix",
        "Multinomial", "NegativeLogLikelihoodLoss", "Optional", "OptionalGetElement", "OptionalHasElement",
        "QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt", "SequenceConstruct", "SequenceEmpty",
        "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss",
        "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
    }
)  # fmt: skip
NOT_BUILT = {"tensorrt-rtx": frozenset({"NonZero", "RoiAlign", "NonMaxSuppression"})}
_READ_ATTRIBUTES = {
    "axis": AttributeProto.INT, "block_size": AttributeProto.INT, "output_dtype": AttributeProto.INT,
    "group": AttributeProto.INT, "transA": AttributeProto.INT, "transB": AttributeProto.INT,
    "to": AttributeProto.INT, "perm": AttributeProto.INTS, "allowzero": AttributeProto.INT,
}  # fmt: skip
_OWNERS = ("QuantizeLinear", "DequantizeLinear", "Conv", "ConvTranspose", "Gemm", "Cast", "Transpose", "Reshape")


@rule(
    "operator",
    "error",
    "The backend can build every operator",
    observed("supports_operator of its parser; NonZero, RoiAlign and NonMaxSuppression fail on TensorRT-RTX only")
    + "; onnx-tensorrt, docs/operators.md",
    "Export the model without it; integer operators (QLinearConv, MatMulInteger, …) as QuantizeLinear and "
    "DequantizeLinear around the float ones (onnxruntime: QuantFormat.QDQ).",
)
def operator(view: View) -> Iterator[Hit]:
    """Operators that stop the parser or the build."""
    backend = view.situation.backend
    refused = UNKNOWN_TO_PARSER | NOT_BUILT.get(backend.name, frozenset())
    for op, sites in _grouped(view, lambda site: _is_standard(site) and site.node.op_type in refused).items():
        yield Hit(sites[0].name, f"{backend.title} does not build {op[1]}{_times(sites)}")


@rule(
    "custom-domain",
    "error",
    "Every operator is ONNX's own",
    observed("the parser goes by the name alone: it takes another domain's operator for ONNX's, or for a plugin")
    + "; com.microsoft: onnxruntime docs/ContribOperators.md",
    "Export with ONNX's operators: QuantizeLinear and DequantizeLinear of opset 21 take INT4 and blocks (onnxruntime: "
    "QuantFormat.QDQ instead of MatMulNBits).",
)
def custom_domain(view: View) -> Iterator[Hit]:
    """Operators of other domains, but for the model's own functions and TensorRT's."""
    functions = {(function.domain, function.name) for function in view.model.functions}

    def foreign(site: Site) -> bool:
        node = site.node
        return not _is_standard(site) and node.domain != "trt" and (node.domain, node.op_type) not in functions

    for op, sites in _grouped(view, foreign).items():
        yield Hit(sites[0].name, f"{op[0]}::{op[1]}{_times(sites)}")


@rule(
    "trt-domain",
    "warning",
    "Operators of TensorRT's own domain run nowhere else",
    "Model-Optimizer writes trt::DequantizeLinear at opset 20; ONNX Runtime has no such operator",
    "Use DequantizeLinear of opset 21: then parity can be verified, and weights read.",
)
def trt_domain(view: View) -> Iterator[Hit]:
    """Operators named trt::."""
    for op, sites in _grouped(view, lambda site: bool(site.node.domain == "trt")).items():
        yield Hit(sites[0].name, f"{op[0]}::{op[1]}{_times(sites)}")


@rule(
    "input-shape",
    "error",
    "Every input is a tensor of known rank",
    "slope-compile: the optimization profile is made from the inputs' shapes",
    "Export the model with the shapes of its inputs.",
)
def input_shape(view: View) -> Iterator[Hit]:
    """Inputs without a shape."""
    for name, kind in _inputs(view):
        if not kind.HasField("tensor_type"):
            yield Hit(f"input '{name}'", "is no tensor")
        elif not kind.tensor_type.HasField("shape"):
            yield Hit(f"input '{name}'", "has no shape")


@rule(
    "dynamic-axis",
    "error",
    "Only the first axis of an input, the batch, is dynamic",
    "slope-compile: the optimization profile spans batch sizes; TensorRT chooses kernels for one opt shape",
    "Export the model with that size fixed.",
)
def dynamic_axis(view: View) -> Iterator[Hit]:
    """Dynamic heights, widths, sequence lengths."""
    for name, kind in _inputs(view):
        for axis, dim in enumerate(kind.tensor_type.shape.dim):
            if dim.HasField("dim_value"):
                if dim.dim_value < 1:
                    yield Hit(f"input '{name}'", f"axis {axis} has the length {dim.dim_value}")
            elif axis:
                called = f" ('{dim.dim_param}')" if dim.dim_param else ""
                yield Hit(f"input '{name}'", f"axis {axis}{called} is dynamic")


@rule(
    "node-names",
    "warning",
    "Nodes have names, each its own",
    "slope-compile: an engine's layers are matched to the graph by `[ONNX Layer: NAME]` of TensorRT's layer list",
    "Name the nodes: without names nobody can say which layer became which kernel.",
)
def node_names(view: View) -> Iterator[Hit]:
    """Nodes without a name, and names that several nodes share."""
    nodes = view.model.graph.node
    unnamed = sum(not node.name for node in nodes)
    if unnamed:
        yield Hit("graph", f"{unnamed} of {len(nodes)} nodes have no name")
    shared = [name for name, count in Counter(f"{node.name}" for node in nodes if node.name).items() if count > 1]
    if shared:
        yield Hit(shared[0], f"{len(shared)} names belong to several nodes each")


@rule(
    "attribute-type",
    "error",
    "Attributes have the types that ONNX gives them",
    ONNX,
    "Export the model again.",
)
def attribute_type(view: View) -> Iterator[Hit]:
    """Attributes of a wrong type, in the operators that lie between a weight and its layer."""
    for site in view.of(*_OWNERS):
        for attribute in site.node.attribute:
            wanted = _READ_ATTRIBUTES.get(attribute.name)
            if wanted is not None and not attribute.ref_attr_name and attribute.type != wanted:
                yield Hit(
                    site.name, f"its attribute '{attribute.name}' is no {AttributeProto.AttributeType.Name(wanted)}"
                )


def _is_standard(site: Site) -> bool:
    return site.node.domain in ("", "ai.onnx")


def _grouped(view: View, chosen: Callable[[Site], bool]) -> dict[tuple[str, str], list[Site]]:
    groups: dict[tuple[str, str], list[Site]] = defaultdict(list)
    for site in view.sites:
        if chosen(site):
            groups[(site.node.domain, site.node.op_type)].append(site)
    return groups


def _times(sites: list[Site]) -> str:
    return f", {len(sites)} times" if len(sites) > 1 else ""


def _inputs(view: View) -> Iterator[tuple[str, onnx.TypeProto]]:
    initializers = {tensor.name for tensor in view.model.graph.initializer}
    return ((f"{one.name}", one.type) for one in view.model.graph.input if one.name not in initializers)
