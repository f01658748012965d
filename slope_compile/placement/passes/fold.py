"""Turns coded weights into constants: codes times scale, the zeros of a pattern in place, no DequantizeLinear.

TensorRT looks for 2:4 in FP16 constants; a DequantizeLinear of INT8 codes beside float activations hides it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from slope_compile.placement.passes.graph import add_constant, codes_of, constant, dequantizers

_OURS = re.compile(r"(?P<name>.+)\.q(?P<suffix>(_\d+)?)", re.DOTALL)  # how the export names a quantizer


class FoldWeights(ir.passes.InPlacePass):
    """Puts constants in the place of DequantizeLinear nodes, under the weights' names.

    Args:
        values: Weight name -> its values, in the layout that DequantizeLinear makes; written in the type that the
            node makes.
    """

    def __init__(self, values: Mapping[str, npt.NDArray[np.float32]]) -> None:
        self._values = dict(values)

    def requires(self, model: ir.Model) -> None:
        """Only DequantizeLinear reads the codes, and all of them alike."""
        for name in self._values:
            nodes = dequantizers(codes_of(model, name), name)
            ways = {(node.inputs[1], *sorted(str(a) for a in node.attributes.values())) for node in nodes}
            if len(ways) != 1:
                raise ir.passes.PreconditionError(f"the codes of '{name}' are dequantized in {len(ways)} ways")
            if any(node.outputs[0].is_graph_output() for node in nodes):
                raise ir.passes.PreconditionError(f"the weight '{name}' is an output of the model")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the nodes, then drop codes and scales that nothing reads any more."""
        for name, values in self._values.items():
            nodes = dequantizers(codes_of(model, name), name)
            kind = _made_type(nodes[0])
            graph = codes_of(model, name).graph
            assert graph is not None  # an initializer belongs to a graph
            array = np.ascontiguousarray(values).astype(kind.numpy())
            for node in nodes:
                if node.outputs[0].name == name:
                    node.outputs[0].name = f"{name}.dequantized"
            held = codes_of(model, name)
            if held.name == name:  # a file of another tool, whose codes have the weight's name
                graph.initializers.pop(name)
                held.name = f"{name}.codes"
                graph.register_initializer(held)
            value = add_constant(graph, name, ir.tensor(array, dtype=kind, name=name))
            for node in nodes:
                node.outputs[0].replace_all_uses_with(value)
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(self._values))

    def ensures(self, model: ir.Model) -> None:
        """Every named weight is a constant of floats."""
        for name in self._values:
            value = codes_of(model, name)
            if value.name != name or value.dtype is None or not value.dtype.is_floating_point():
                raise ir.passes.PostconditionError(f"'{name}' is no constant")


def _made_type(node: ir.Node) -> ir.DataType:
    """Return the type that a DequantizeLinear makes: its output_dtype, else its scale's."""
    declared = node.attributes.get_int("output_dtype", 0)
    scale = node.inputs[1]
    assert scale is not None  # DequantizeLinear has a scale
    return ir.DataType(declared) if declared else constant(scale).dtype


class RemoveQuantizers(ir.passes.InPlacePass):
    """Takes the Q/DQ pairs of activations away, with the Clip that only a quantizer of ours has: values flow on."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Let whatever reads a pair read what the pair reads."""
        modified = False
        for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
            quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
            if quantize is None or quantize.op_type != "QuantizeLinear" or quantize.inputs[0] is None:
                continue
            value = _before_clip(quantize)
            ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
            modified = True
        RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """No QuantizeLinear is left."""
        left = [node.name for node in model.graph if node.op_type == "QuantizeLinear"]
        if left:
            raise ir.passes.PostconditionError(f"quantizers are left: {', '.join(map(str, left[:5]))}")


def _before_clip(quantize: ir.Node) -> ir.Value:
    """Return what a quantizer reads, its own Clip or Relu aside: NAME.clip of NAME.q, NAME.clip_1 of NAME.q_1."""
    value = quantize.inputs[0]
    assert value is not None  # QuantizeLinear has an input
    clip = value.producer()
    ours = _OURS.fullmatch(quantize.name or "")
    if clip is None or ours is None or clip.op_type not in ("Clip", "Relu") or clip.inputs[0] is None:
        return value
    return clip.inputs[0] if clip.name == f"{ours['name']}.clip{ours['suffix']}" else value
