"""Puts codes, scale and DequantizeLinear where the held weights were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ModelError
from slope_compile.export.passes.activations import reads_int8
from slope_compile.export.passes.hold import consumers
from slope_compile.export.placement import Placement, place

_CONTAINERS = {"INT2": ml_dtypes.int2, "INT4": ml_dtypes.int4, "INT8": np.int8}


class QuantizeWeights(ir.passes.InPlacePass):
    """Gives each held weight back: coded ones as NAME.codes, NAME.scale and DequantizeLinear, others as initializers.

    Args:
        held: Weight name -> float32 values, from `HoldWeights`.
        codes: Weight name -> codes; a subset of the held ones.
        opset: The file's operator set.

    Attributes:
        placements: Weight name -> (operator, placement) of every held weight.
    """

    def __init__(self, held: Mapping[str, npt.NDArray[Any]], codes: Mapping[str, CodedTensor], opset: int) -> None:
        self.placements: dict[str, tuple[str, Placement]] = {}
        self._held = held
        self._codes = codes
        self._opset = opset

    def requires(self, model: ir.Model) -> None:
        """Every held weight is still an input that only layers multiply with, and its new names are free."""
        inputs = {value.name: value for value in model.graph.inputs}
        made = {value.name for node in model.graph for value in node.outputs if value.name}
        taken = made | set(model.graph.initializers)
        for name in self._held:
            if name not in inputs or not consumers(inputs[name]):
                raise ModelError(
                    f"The exported graph no longer multiplies with '{name}' as it is.",
                    "This is a model that slope-compile cannot export yet; please report it.",
                )
            clash = taken & {name, f"{name}.codes", f"{name}.scale"}
            if clash:
                raise ModelError(
                    f"The exported graph already has a value '{sorted(clash)[0]}'.", "Rename that parameter."
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the inputs, in the order in which the layers were held."""
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        first = graph[0]
        for name, values in self._held.items():
            value = inputs[name]
            users = consumers(value)
            node = users[0]  # requires() saw it; all of them multiply in the same way
            graph.inputs.remove(value)
            if name not in self._codes:
                self.placements[name] = node.op_type, Placement("float", "the policy left it in float", "FLOAT")
                value.const_value = ir.tensor(values, name=name)
                graph.register_initializer(value)
                continue
            tensor = self._codes[name]
            placement = place(tensor, node.op_type, self._opset, all(reads_int8(one) for one in users))
            self.placements[name] = node.op_type, placement
            dequantize = _dequantize(graph, name, tensor, placement)
            value.replace_all_uses_with(dequantize.outputs[0])
            value.name = f"{name}.held"  # two values of one name may not meet in a graph
            dequantize.outputs[0].name = name
            graph.insert_before(first, dequantize)
        return ir.passes.PassResult(model, modified=bool(self._held))

    def ensures(self, model: ir.Model) -> None:
        """Only the model's own input is left, and no float values under a coded weight's name."""
        if len(model.graph.inputs) != 1:
            raise ir.passes.PostconditionError(f"inputs {[value.name for value in model.graph.inputs]} are left")
        left = set(self._codes) & set(model.graph.initializers)
        if left:
            raise ir.passes.PostconditionError(f"float values of {sorted(left)} are left")


def _dequantize(graph: ir.Graph, name: str, tensor: CodedTensor, placement: Placement) -> ir.Node:
    """Register codes and scale, and return the DequantizeLinear that makes the weight of them."""
    codes = np.asarray(tensor.codes)
    scale = np.asarray(tensor.scale, dtype=np.float32)  # [channels]
    attributes = {"axis": tensor.axis}
    if placement.block_size:
        # [out] -> [out, in / block]: every block of a row repeats the row's scale, so the values stay bit for bit.
        blocks = codes.shape[1] // placement.block_size
        scale = np.repeat(scale[:, None], blocks, axis=1)
        attributes = {"axis": 1, "block_size": placement.block_size}
    inputs = []
    for suffix, array in (("codes", codes.astype(_CONTAINERS[placement.container])), ("scale", scale)):
        constant = ir.tensor(array, name=f"{name}.{suffix}")
        kind, shape = ir.TensorType(constant.dtype), ir.Shape(array.shape)
        value = ir.Value(name=constant.name, type=kind, shape=shape, const_value=constant)
        graph.register_initializer(value)
        inputs.append(value)
    node = ir.node("DequantizeLinear", inputs, attributes, name=f"{name}.dq")
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(codes.shape)
    return node
