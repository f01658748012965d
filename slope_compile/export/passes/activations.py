"""Quantizers of activations: one operator of ours in the traced graph, then Q/DQ, then proved on the written bytes.

    x -> Clip(-Qn * s, Qp * s) -> QuantizeLinear(s, INT8) -> DequantizeLinear(s) -> v̂

The Clip is left out where INT8 itself clips there (signed 8 bits), and is a Relu, or nothing behind one, for 0 to 127.
QuantizeLinear divides, rounds ties to even and saturates, as the trained quantizer does, so v̂ is the same to the bit:
what the Clip cuts at fl(Qp * s) is within an ulp of Qp after the division, and rounds to Qp.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from slope_compile.compression.activations import (
    INT8_MAX,
    ActivationQuantizer,
    TrainedQuantizer,
    activation_quantizers,
)
from slope_compile.errors import CheckFailedError
from slope_compile.qdq.activations import NESTED_CONCATS, NONNEGATIVE, stored_quantizers

DOMAIN, OPERATOR = "slope_compile", "FakeQuantize"
INT8_MIN = -128
_MOVERS = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather")
_MOVES = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
_KEEPS_SIGN = (
    "MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Flatten", "Transpose", "QuantizeLinear",
    "DequantizeLinear",
)  # fmt: skip


def emit_quantizers(model: nn.Module) -> None:
    """Replace the quantizers of a model, in place, by modules that torch.onnx.export turns into our operator."""
    stand_ins: dict[int, nn.Module] = {id(module): _Emitted(name) for name, module in activation_quantizers(model)}
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if isinstance(child, ActivationQuantizer):
                setattr(parent, attribute, stand_ins[id(child)])


class QuantizeActivations(ir.passes.InPlacePass):
    """Turns each operator of ours into Clip, QuantizeLinear and DequantizeLinear: NAME.clip, NAME.q, NAME.dq.

    One quantizer that reads one value several times does so once in the file. One that is called on several values
    shares NAME.scale among NAME.q, NAME.q_1, ...

    Args:
        quantizers: The trained ones by name.

    Attributes:
        placed: Name -> how many Q/DQ pairs it got; 0 where the exported forward does not use it.
    """

    def __init__(self, quantizers: Mapping[str, TrainedQuantizer]) -> None:
        self.placed = dict.fromkeys(quantizers, 0)
        self._quantizers = quantizers
        self._made: dict[tuple[ir.Value, str], ir.Value] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the operators, in graph order."""
        graph = model.graph
        for node in [node for node in graph if node.domain == DOMAIN and node.op_type == OPERATOR]:
            name, value = node.attributes["name"].as_string(), node.inputs[0]
            assert value is not None  # the operator has one input
            if (value, name) not in self._made:
                self._made[value, name] = self._place(graph, node, self._quantizers[name], value)
            _give_way(graph, node, self._made[value, name])
        for quantized in set(self._made.values()):
            _drop_zero_point(quantized)
        model.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(self._made))

    def ensures(self, model: ir.Model) -> None:
        """None of our operators is left."""
        if any(node.domain == DOMAIN for graph in model.graphs() for node in graph):
            raise ir.passes.PostconditionError(f"{DOMAIN} operators are left")

    def _place(self, graph: ir.Graph, node: ir.Node, quantizer: TrainedQuantizer, value: ir.Value) -> ir.Value:
        name = quantizer.name
        suffix = f"_{self.placed[name]}" if self.placed[name] else ""
        self.placed[name] += 1
        scale = _constant(graph, f"{name}.scale", np.float32(quantizer.scale))
        zero_point = _constant(graph, f"{name}.zero_point", np.int8(0))
        nodes = []
        if (clip := _clip(graph, quantizer, value)) is not None:
            nodes.append(clip)
            clip.name = f"{name}.clip{suffix}"
        before = nodes[-1].outputs[0] if nodes else value
        nodes.append(ir.node("QuantizeLinear", [before, scale, zero_point], name=f"{name}.q{suffix}"))
        nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero_point], name=f"{name}.dq{suffix}"))
        for one in nodes:
            one.outputs[0].name = f"{one.name}.out"
            one.outputs[0].shape = node.outputs[0].shape
            kind = ir.DataType.INT8 if one.op_type == "QuantizeLinear" else ir.DataType.FLOAT
            one.outputs[0].type = ir.TensorType(kind)
        graph.insert_before(node, nodes)
        return nodes[-1].outputs[0]


def reads_int8(node: ir.Node) -> bool:
    """Return whether the first input of a layer is dequantized right before it, from what a QuantizeLinear made."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    while source is not None and source.op_type in _MOVES and source.inputs[0] is not None:
        source = source.inputs[0].producer()
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0] is None:
        return False
    made = source.inputs[0].producer()
    return made is not None and made.op_type == "QuantizeLinear"


class ProveActivations(ir.passes.InPlacePass):
    """Proves on the bytes written that every quantizer is there as trained, as often as it is called.

    Args:
        path: The file.
        quantizers: The trained ones by name.
        placed: How many Q/DQ pairs each has got.
    """

    def __init__(self, path: Path, quantizers: Mapping[str, TrainedQuantizer], placed: Mapping[str, int]) -> None:
        self._path, self._quantizers, self._placed = path, quantizers, placed

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change nothing."""
        return ir.passes.PassResult(model, modified=False)

    def ensures(self, model: ir.Model) -> None:
        """Pairs, scales (bit for bit), zero points and ranges of the file are the trained ones."""
        found = Counter((one.name, _bits(one.scale), one.zero_point, one.high) for one in stored_quantizers(self._path))
        expected = Counter(
            {(name, _bits(one.scale), 0, one.high): self._placed[name] for name, one in self._quantizers.items()}
        )
        low = {name: one.low for name, one in self._quantizers.items()}
        # A lower end above the trained one is a Relu of the model's own, which leaves nothing to clip.
        wrong = [one.name for one in stored_quantizers(self._path) if one.low < low.get(one.name, INT8_MIN)]
        if found != +expected or wrong:
            names = sorted({key[0] for key in (found - expected) + (expected - found)} | set(wrong))
            raise CheckFailedError(
                f"{self._path.name} does not hold the trained quantizers of activations: "
                f"{', '.join(names[:5])} differ; {found.total()} Q/DQ pairs for {expected.total()}."
            )


class _Emitted(nn.Module):
    """Stands in for a quantizer while torch.export traces the model."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def forward(self, v: Tensor) -> Tensor:
        """Emit our operator, one float32 tensor in, one like it out."""
        made: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OPERATOR}", (v,), {"name": self._name}, dtype=v.dtype, shape=v.shape, version=1
        )
        return made


def _clip(graph: ir.Graph, quantizer: TrainedQuantizer, value: ir.Value) -> ir.Node | None:
    """Return what must clip before QuantizeLinear, None where INT8 saturates at the same levels by itself."""
    if quantizer.high < INT8_MAX:
        scale = np.float32(quantizer.scale)
        bounds = [
            _constant(graph, f"{quantizer.name}.{end}", np.float32(np.float32(level) * scale))
            for end, level in (("min", quantizer.low), ("max", quantizer.high))
        ]
        return ir.node("Clip", [value, *bounds])
    if quantizer.low == INT8_MIN or _is_nonnegative(value):
        return None
    return ir.node("Relu", [value])


def _is_nonnegative(value: ir.Value | None, concats: int = NESTED_CONCATS) -> bool:
    """Return whether a value comes from a Relu or its like, through nothing that could make it negative."""
    node = None if value is None else value.producer()
    while node is not None and node.domain == "" and node.op_type in _KEEPS_SIGN and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "Concat" and concats:
        return all(_is_nonnegative(one, concats - 1) for one in node.inputs)
    return node.op_type in NONNEGATIVE


def _drop_zero_point(dequantized: ir.Value) -> None:
    """Let the attribute `output_dtype` say INT8 instead of a zero point, where a mover reads what was dequantized.

    ONNX Runtime quantizes behind such a node again, with both, and then refuses its own node (seen in 1.31, opset 21).
    Elsewhere the zero point stays: TensorRT's parsers have taken it since they take QuantizeLinear.
    """
    if not any(use.node.op_type in _MOVERS for use in dequantized.uses()):
        return
    dequantize = dequantized.producer()
    quantize = dequantize.inputs[0].producer()  # type: ignore[union-attr]  # the pair that _place made
    for node in (quantize, dequantize):
        node.resize_inputs(2)  # type: ignore[union-attr]
    quantize.attributes["output_dtype"] = ir.AttrInt64("output_dtype", ir.DataType.INT8)  # type: ignore[union-attr]


def _constant(graph: ir.Graph, name: str, array: np.float32 | np.int8) -> ir.Value:
    """Return the scalar initializer of that name, made if it is not there."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([]), const_value=tensor)
    graph.register_initializer(value)
    return value


def _give_way(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let a value take the place of what a node makes, also as an output of the graph, and remove the node."""
    old = node.outputs[0]
    if old.is_graph_output():
        value.name, old.name = old.name, f"{old.name}.replaced"
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _bits(scale: float) -> bytes:
    return struct.pack("<f", scale)
