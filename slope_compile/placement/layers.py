"""What a placement may depend on in the file: one Layer for every weight, counted on the bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import NodeProto

from slope_compile.errors import ArtifactError
from slope_compile.placement.scales import blocked_scale, row_scale
from slope_compile.placement.shapes import Shapes
from slope_compile.qdq.activations import is_quantized
from slope_compile.qdq.epilogue import Readers, leaves_as_int8, readers
from slope_compile.qdq.graph import Scope, scopes
from slope_compile.qdq.matrices import BLOCKS, GEMM
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.reader import trace_constant, weight_inputs
from slope_compile.qdq.tensors import REMEDY, load_graph
from slope_compile.qdq.weights import CodedWeight


@dataclass(frozen=True)
class Layer:
    """A weight and the operators that multiply with it.

    Attributes:
        name: The weight's name.
        op: Conv, ConvTranspose, MatMul or Gemm.
        shape: Of the weight, as the operator takes it.
        stored: ONNX's name of the type it is stored in.
        bits: Fewest bits, signed, that hold every code; None for a weight stored as floats.
        sparse: Whether at most 2 of every 4 input channels are not zero, counted.
        groups: Of a convolution; 1 for others.
        kernel: Of a convolution, such as (3, 3); () for others.
        reduction: Products summed for one output: C·R·S of a convolution, K of a matrix.
        channels: Output channels.
        positions: Outputs per image and output channel: H·W of a convolution, rows of a matrix product.
        positions_known: Whether the file says so; else `positions` is 1 for each operator.
        inputs: Elements read per image.
        outputs: Elements written per image.
        quantized_input: Whether every operator reads an activation that is quantized.
        any_quantized_input: Whether one of them does.
        quantized_output: Whether all that leaves the operators is quantized next: the epilogue is INT8.
        zero_points: Whether a zero point is not 0.
        per_row: Whether each output channel has one scale.
        block_size: Input channels that share a stored scale; 0 for none.
        blocks: Block sizes, of those that TensorRT takes, into which the scales fit.
        plain: Whether the matrix is 2-D, the second factor, and in its own layout up to a Transpose: it can be padded.
        opset: The file's operator set.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    stored: str
    bits: int | None
    sparse: bool
    groups: int
    kernel: tuple[int, ...]
    reduction: int
    channels: int
    positions: int
    positions_known: bool
    inputs: int
    outputs: int
    quantized_input: bool
    any_quantized_input: bool
    quantized_output: bool
    zero_points: bool
    per_row: bool
    block_size: int
    blocks: frozenset[int]
    plain: bool
    opset: int

    @property
    def is_gemm(self) -> bool:
        """Whether it is a matrix product."""
        return self.op in GEMM

    @property
    def label(self) -> str:
        """The layer's name, by which a recipe calls it: the weight's without `.weight`."""
        return self.name.removesuffix(".weight")

    @property
    def elements(self) -> int:
        """How many numbers the weight has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _User:
    """One operator that multiplies with a weight."""

    scope: Scope
    node: NodeProto
    index: int


def read_layers(model: Path, weights: Sequence[CodedWeight]) -> list[Layer]:
    """Return the facts of every weight, in order.

    Args:
        model: The ONNX file.
        weights: What the reader found in it.

    Raises:
        ArtifactError: If the file is malformed.
    """
    proto = load_graph(model)
    every = list(scopes(proto))
    users, read = _users(every), readers(every)
    opset = max((one.version for one in proto.opset_import if one.domain in ("", "ai.onnx")), default=1)
    near = [user for weight in weights for user in users.get((weight.name, weight.op), [])]
    shapes = Shapes(proto, [name for user in near for name in (user.node.output[0], _activation(user))])
    return [_layer(weight, users.get((weight.name, weight.op), []), shapes, read, opset) for weight in weights]


def _users(every: Sequence[Scope]) -> dict[tuple[str, str], list[_User]]:
    """Return the operators that multiply with each constant: (its name as the reader's, the operator) -> users."""
    found: dict[tuple[str, str], list[_User]] = {}
    for scope in every:
        for node in scope.nodes:
            for index in weight_inputs(node):
                _, name, tensor = trace_constant(scope, node.input[index])
                if tensor is not None:
                    if len(node.input) < 2 or not node.output:
                        raise ArtifactError(f"The {node.op_type} '{node.name}' lacks an input or an output.", REMEDY)
                    key = (name or node.name).removesuffix(".codes"), node.op_type
                    found.setdefault(key, []).append(_User(scope, node, index))
                    break
    return found


def _activation(user: _User) -> str:
    """Return the operator's other factor."""
    return str(user.node.input[1 - user.index])


def _layer(weight: CodedWeight, users: list[_User], shapes: Shapes, read: Readers, opset: int) -> Layer:
    shape = weight.consumed(weight.stored).shape
    gemm = weight.op in GEMM
    groups = 1 if gemm or not users else max(1, users[0].scope.integer(users[0].node, "group", 1))
    axis = weight.consumed_axis
    channels = shape[1] * groups if weight.op == "ConvTranspose" else _output_channels(weight, shape)
    counted = [_counts(user, weight, channels, math.prod(shape), shapes) for user in users] or [(1, False, 0, 0)]
    quantized = [any(is_quantized(user.scope, name) for name in user.node.input[:2]) for user in users]
    steps = all(step.kind == "transpose" for step in weight.steps)
    return Layer(
        name=weight.name,
        op=weight.op,
        shape=shape,
        stored=weight.dtype,
        bits=_bits(weight),
        sparse=is_sparse(weight),
        groups=groups,
        kernel=() if gemm else shape[2:],
        reduction=max(1, shape[axis] if gemm else shape[1 - (weight.op == "ConvTranspose")] * math.prod(shape[2:])),
        channels=channels,
        positions=sum(count[0] for count in counted),
        positions_known=all(count[1] for count in counted),
        inputs=sum(count[2] for count in counted),
        outputs=sum(count[3] for count in counted),
        quantized_input=bool(quantized) and all(quantized),
        any_quantized_input=any(quantized),
        quantized_output=bool(users) and all(leaves_as_int8(user.scope, user.node.output[0], read) for user in users),
        zero_points=weight.zero_point is not None and bool(np.any(weight.zero_point)),
        per_row=not weight.block_size or (gemm and row_scale(weight) is not None),
        block_size=weight.block_size,
        blocks=frozenset(
            b for b in BLOCKS if gemm and weight.codes is not None and blocked_scale(weight, b) is not None
        ),
        plain=gemm and weight.stored.ndim == 2 and steps and bool(users) and all(user.index == 1 for user in users),
        opset=opset,
    )


def _output_channels(weight: CodedWeight, shape: tuple[int, ...]) -> int:
    if weight.op == "Conv":
        return shape[0]
    return math.prod(shape) // max(1, shape[weight.consumed_axis])


def _counts(
    user: _User, weight: CodedWeight, channels: int, elements: int, shapes: Shapes
) -> tuple[int, bool, int, int]:
    """Return positions per image, whether they are known, elements read and elements written per image."""
    outputs, inputs = shapes.per_image(user.node.output[0]), shapes.per_image(_activation(user))
    reduction = max(1, elements // max(1, channels))
    if outputs is None:
        return 1, False, inputs or reduction, channels
    positions = max(1, outputs // max(1, channels))
    if weight.op == "ConvTranspose":  # every input position meets every number of the weight once
        positions = max(1, (inputs or 1) // max(1, weight.stored.shape[weight.consumed_axis]))
    return positions, True, inputs or positions * reduction, outputs


def _bits(weight: CodedWeight) -> int | None:
    """Return the fewest bits of a signed type that holds every code; None for floats."""
    if weight.codes is None:
        return None
    low, high = int(weight.codes.min(initial=0)), int(weight.codes.max(initial=0))
    return next(bits for bits in range(2, 10) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))
