"""Repeats a matrix's scales per block of input channels, as TensorRT wants them beside INT4, or takes blocks away.

    W[k, n] = codes[k, n] * s[n] = codes[k, n] * S[k // block, n],  S[j, n] = s[n]

Where the block does not divide K, codes get zeros behind their end and so does the activation: products of zeros are
zeros, so the sum over K is the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slope_compile.placement.passes.graph import (
    add_constant,
    codes_of,
    constant,
    dequantizers,
    multipliers,
    set_constant,
)


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales that a matrix gets.

    Args:
        scale: float32: one per block in the codes' shape with `axis` divided by `block_size`, or one per row.
        axis: The blocked axis of the codes, or the one that scales per row run along.
        block_size: Elements of that axis that share a scale; 0: one per row.
    """

    scale: npt.NDArray[np.float32]
    axis: int
    block_size: int


class SetScales(ir.passes.InPlacePass):
    """Gives some weights other scales of the same values, and pads what a block size does not divide.

    Args:
        scales: Weight name -> what it gets.
    """

    def __init__(self, scales: Mapping[str, Scales]) -> None:
        self._scales = dict(scales)

    def requires(self, model: ir.Model) -> None:
        """Every named weight is dequantized right behind its codes; a padded one is a plain second factor."""
        for name, wanted in self._scales.items():
            codes = codes_of(model, name)
            for node in dequantizers(codes, name):
                if node.inputs[0] is not codes:
                    raise ir.passes.PreconditionError(f"the codes of '{name}' are turned before they are dequantized")
                if len(node.inputs) > 2 and node.inputs[2] is not None and np.any(constant(node.inputs[2]).numpy()):
                    raise ir.passes.PreconditionError(f"the zero points of '{name}' are not 0")
                if _missing(codes, wanted):
                    for user, index in multipliers(node.outputs[0], name):
                        if index != 1 or user.op_type not in ("MatMul", "Gemm"):
                            raise ir.passes.PreconditionError(f"'{name}' is no second factor, so it cannot be padded")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace scales, then pad."""
        for name, wanted in self._scales.items():
            codes = codes_of(model, name)
            missing = _missing(codes, wanted)
            nodes = dequantizers(codes, name)
            for node in nodes:
                _replace(node, name, wanted)
            if missing:
                _pad_codes(codes, wanted.axis, missing)
                for node in nodes:
                    for user, _ in multipliers(node.outputs[0], name):
                        _pad_activation(user, name, missing)
                    _forget_shapes(node)
        return ir.passes.PassResult(model, modified=bool(self._scales))

    def ensures(self, model: ir.Model) -> None:
        """Every named weight has whole blocks of the size wanted."""
        for name, wanted in self._scales.items():
            codes = codes_of(model, name)
            sizes = {node.attributes.get_int("block_size", 0) for node in dequantizers(codes, name)}
            if sizes != {wanted.block_size} or _missing(codes, wanted):
                raise ir.passes.PostconditionError(f"the codes of '{name}' have no blocks of {wanted.block_size}")


def _missing(codes: ir.Value, wanted: Scales) -> int:
    """Return how many zeros are missing for whole blocks."""
    return -constant(codes).numpy().shape[wanted.axis] % wanted.block_size if wanted.block_size else 0


def _replace(node: ir.Node, name: str, wanted: Scales) -> None:
    """Give one DequantizeLinear its scales, and leave those of other nodes alone."""
    old = node.inputs[1]
    assert old is not None and node.graph is not None  # DequantizeLinear has a scale
    array = wanted.scale.astype(constant(old).numpy().dtype)
    if len(old.uses()) == 1 and old.is_initializer():
        set_constant(old, ir.tensor(array, name=old.name))
    else:
        scale = ir.tensor(array, name=f"{name}.scale")
        node.replace_input_with(1, add_constant(_owner(node), f"{name}.scale", scale))
    if len(node.inputs) > 2:  # zeros in the old scales' shape
        node.resize_inputs(2)
    node.attributes.pop("block_size", None)
    if wanted.block_size:
        node.attributes["block_size"] = ir.AttrInt64("block_size", wanted.block_size)
    node.attributes["axis"] = ir.AttrInt64("axis", wanted.axis)


def _pad_codes(codes: ir.Value, axis: int, missing: int) -> None:
    old = constant(codes)
    widths = [(0, missing if a == axis else 0) for a in range(len(old.shape))]
    padded = np.pad(old.numpy().astype(np.int8), widths).astype(old.numpy().dtype)
    set_constant(codes, ir.tensor(padded, dtype=old.dtype, name=codes.name))


def _pad_activation(user: ir.Node, name: str, missing: int) -> None:
    """Put zeros behind the end of the activation's K axis."""
    activation, graph = user.inputs[0], _owner(user)
    assert activation is not None
    axis = 0 if user.op_type == "Gemm" and user.attributes.get_int("transA", False) else -1
    pads = add_constant(graph, f"{name}.pads", ir.tensor(np.array([0, missing], np.int64)))
    axes = add_constant(graph, f"{name}.pads.axes", ir.tensor(np.array([axis], np.int64)))
    pad = ir.node("Pad", [activation, pads, None, axes], {"mode": "constant"}, name=f"{name}.pad")
    out = pad.outputs[0]
    out.name, out.type = f"{pads.name}.out", activation.type
    if activation.shape is not None:
        dims: list[int | ir.SymbolicDim | None] = list(activation.shape)
        size = dims[axis]
        dims[axis] = size + missing if isinstance(size, int) else None
        out.shape = ir.Shape(dims)
    graph.insert_before(user, pad)
    user.replace_input_with(0, out)


def _forget_shapes(node: ir.Node) -> None:
    """Drop the old shape of a padded weight, and of what only turns or casts it."""
    pending = [node.outputs[0]]
    while pending:
        value = pending.pop()
        value.shape = None
        pending += [
            use.node.outputs[0] for use in value.uses() if use.node.op_type in ("Transpose", "Identity", "Cast")
        ]


def _owner(node: ir.Node) -> ir.Graph:
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise ir.passes.PreconditionError(f"'{node.name}' lies in a function of the model")
    return graph
