"""What a layer computes with, on either side, in the layout that torch keeps it in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from onnx import NodeProto, helper

from slope_compile.placement.rounding import exact_values
from slope_compile.qdq.reader import weight_of
from slope_compile.qdq.tensors import to_numpy
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.bisect.graph import NORMS, OnnxGraph
from slope_compile.verify.bisect.onnx_side import OnnxSide
from slope_compile.verify.bisect.points import Side
from slope_compile.verify.bisect.torch_side import TorchSide
from slope_compile.verify.chain.runners import Array

if TYPE_CHECKING:
    from torch import nn

_OF_NORM = ("weight", "bias", "running_mean", "running_var")
_ATTRIBUTES = ("strides", "pads", "dilations", "group", "epsilon", "alpha", "beta")


@dataclass(frozen=True)
class Parameters:
    """A layer's constants.

    Args:
        weight: Output channels first, before any cast to half precision; of a norm, its factor.
        coded: How the file stores it; None for torch.
        others: `bias`, `running_mean`, `running_var`.
        attributes: `strides`, `pads`, `dilations`, `group`, `epsilon`, a Gemm's `alpha` and `beta`, as far as they are
            known.
    """

    weight: Array | None = None
    coded: CodedWeight | None = None
    others: dict[str, Array] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)


def parameters(side: Side, layer: str) -> Parameters | None:
    """Return a layer's constants; None where the side has no such layer.

    Args:
        side: torch, or an ONNX file.
        layer: `layer1.0.conv1`.
    """
    if isinstance(side, OnnxSide):
        node = side.graph.layers.get(layer)
        return None if node is None else _of_node(side.graph, node)
    if isinstance(side, TorchSide):
        try:
            return _of_module(side.module(layer))
        except AttributeError:
            return None
    return None


def in_torch_layout(weight: CodedWeight, array: Array) -> Array:
    """Return an array of the stored shape with output channels first, as torch keeps a layer's weight."""
    turned = weight.consumed(array)
    return turned.T if weight.op in ("MatMul", "Gemm") and turned.ndim == 2 and weight.consumed_axis == 0 else turned


def constant_of(graph: OnnxGraph, name: str) -> Array | None:
    """Return a constant that a node reads, or None where it is computed or of no numbers."""
    tensor = graph.constant(name)
    return None if tensor is None else to_numpy(tensor, graph.path, name)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes that are numbers, lists or text."""
    values = {one.name: helper.get_attribute_value(one) for one in node.attribute if not one.ref_attr_name}
    return {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, bytes | str) else value
        for name, value in values.items()
        if isinstance(value, int | float | bytes | str) or hasattr(value, "__iter__")
    }


def _of_node(graph: OnnxGraph, node: NodeProto) -> Parameters:
    attributes = {name: value for name, value in attributes_of(node).items() if name in _ATTRIBUTES}
    if node.op_type in NORMS:
        found = {
            role: array
            for role, name in zip(_OF_NORM, node.input[1:], strict=False)
            if name and (array := constant_of(graph, name)) is not None
        }
        return Parameters(found.pop("weight", None), None, found, {"epsilon": 1e-5} | attributes)
    coded = weight_of(graph.scope, node, graph.path)
    others = {}
    add = graph.bias_add(node)
    biases = node.input[2:3] if add is None else [name for name in add.input if not graph.is_varying(name)]
    for name in biases:
        array = constant_of(graph, name)
        if array is not None:
            others["bias"] = array
    weight = None if coded is None else in_torch_layout(coded, exact_values(coded))
    if node.op_type in ("Conv", "ConvTranspose") and weight is not None:
        axes = weight.ndim - 2
        defaults = {"strides": [1] * axes, "pads": [0] * 2 * axes, "dilations": [1] * axes, "group": 1}
        attributes = defaults | attributes
    else:
        attributes = {"alpha": 1.0, "beta": 1.0} | attributes
    return Parameters(weight, coded, others, attributes)


def _of_module(module: nn.Module) -> Parameters:
    import torch
    from torch import nn

    with torch.no_grad():
        arrays = {
            name: tensor.detach().float().cpu().numpy()
            for name in _OF_NORM
            if isinstance(tensor := getattr(module, name, None), torch.Tensor)
        }
    attributes: dict[str, Any] = {}
    if isinstance(module, nn.modules.conv._ConvNd):
        attributes = {"strides": list(module.stride), "dilations": list(module.dilation), "group": module.groups}
        if not isinstance(module.padding, str):
            attributes["pads"] = [*module.padding, *module.padding]
    elif isinstance(module, nn.Linear):
        attributes = {"alpha": 1.0, "beta": 1.0}  # Gemm's: of the product, and of the bias
    elif hasattr(module, "eps"):
        attributes = {"epsilon": module.eps}
    return Parameters(arrays.pop("weight", None), None, arrays, attributes)
