"""Reads the weights of an ONNX file back, from the bytes on disk, through Q/DQ, Cast, Transpose, Reshape and Identity.

Polygraphy's `inspect sparsity` skips every INT4 and INT8 weight and passes; this reader exists so that none is skipped.
Malformed files end in an ArtifactError that names the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.qdq.graph import Scope, is_standard, scopes
from slope_compile.qdq.tensors import REMEDY, dtype_name, like, load_graph, to_numpy
from slope_compile.qdq.weights import CodedWeight, Step, check_quantization

__all__ = ["CodedWeight", "coded_weights", "iter_weights"]

NARROW = ("FLOAT16", "BFLOAT16")
_FOLLOWED = ("DequantizeLinear", "QuantizeLinear", "Cast", "CastLike", "Transpose", "Reshape", "Identity")
_Path = list[tuple[Scope, NodeProto]]  # from the consumer back to the initializer


def coded_weights(source: Path | onnx.ModelProto) -> list[CodedWeight]:
    """Return every constant that a Conv, ConvTranspose, MatMul or Gemm multiplies with, in graph order.

    A weight stored as floats is returned too (`codes` is None), also where the graph quantizes it as it runs.
    One that several operators use the same way (a shared head, a tied layer) is returned once.

    Args:
        source: An ONNX file, whose external data must lie in its folder, or a model without external data.

    Raises:
        ArtifactError: If the file is missing, cut off or malformed; the tensor is named.
    """
    return list(iter_weights(source))


def iter_weights(source: Path | onnx.ModelProto, numbers: bool = True) -> Iterator[CodedWeight]:
    """Yield what `coded_weights` returns, reading each tensor when it is its turn.

    Of the numbers in the file, those of one weight are held, if the caller lets go of it (`del weight`) before it asks
    for the next: a byte an element where codes are stored, 4 where floats are (8 for DOUBLE).

    Args:
        source: As `coded_weights`.
        numbers: Without them `stored` has the type and the shape, all 0, in no memory.

    Raises:
        ArtifactError: As `coded_weights`.
    """
    model, place = (source, None) if isinstance(source, onnx.ModelProto) else (load_graph(source), source)
    read = to_numpy if numbers else like
    # The path and the tensor are kept, so that no other object gets their ids.
    seen: dict[tuple[Any, ...], tuple[_Path, TensorProto]] = {}
    yielded: set[tuple[Any, ...]] = set()
    for scope in scopes(model):
        for node in scope.nodes:
            for index in weight_inputs(node):
                path, name, tensor = trace_constant(scope, node.input[index])
                if tensor is None:
                    continue
                key = (id(tensor), tuple(id(step) for _, step in path), node.op_type, index, *_transposed(scope, node))
                if key not in seen:
                    seen[key] = path, tensor
                    weight = [_weight(scope, node, index, path, name, tensor, place, read)]
                    meaning = (id(tensor), *_meaning(weight[0], path))
                    if meaning not in yielded:
                        yielded.add(meaning)
                        yield weight.pop()  # so that nothing here holds it
                    weight.clear()
                break  # where both factors of a MatMul are constant, the second one is the weight


def weight_of(scope: Scope, node: NodeProto, place: Path | None) -> CodedWeight | None:
    """Return the constant that one Conv, ConvTranspose, MatMul or Gemm multiplies with; None where it is computed.

    Args:
        scope: Where the node stands.
        node: The operator.
        place: The model's file, beside which external data may lie.

    Raises:
        ArtifactError: As `coded_weights`.
    """
    for index in weight_inputs(node):
        path, name, tensor = trace_constant(scope, node.input[index])
        if tensor is not None:
            return _weight(scope, node, index, path, name, tensor, place)
    return None


def _meaning(weight: CodedWeight, path: _Path) -> tuple[Any, ...]:
    """Return what tells two uses of one tensor apart: each user of a tied layer may have a Transpose of its own."""
    dequantized = tuple(id(step) for _, step in path if step.op_type not in ("Transpose", "Reshape", "Identity"))
    return dequantized, weight.op, weight.steps, weight.consumed_axis


def weight_inputs(node: NodeProto) -> tuple[int, ...]:
    """Return the inputs that may hold the weight, likeliest first."""
    if is_standard(node, "Conv") or is_standard(node, "ConvTranspose"):
        inputs: tuple[int, ...] = (1,)
    elif is_standard(node, "MatMul") or is_standard(node, "Gemm"):
        inputs = (1, 0)
    else:
        inputs = ()
    return tuple(index for index in inputs if index < len(node.input) and node.input[index])


def _transposed(scope: Scope, node: NodeProto) -> tuple[bool, bool]:
    """Return Gemm's transA and transB."""
    return bool(scope.integer(node, "transA", 0)), bool(scope.integer(node, "transB", 0))


def trace_constant(scope: Scope, name: str) -> tuple[_Path, str, TensorProto | None]:
    """Walk from a consumer's input back to a constant; None where the walk ends in anything else."""
    path: _Path = []
    seen: set[int] = set()
    while True:
        scope, name, source = scope.find(name)
        if source is None or isinstance(source, TensorProto):
            return path, name, source
        if id(source) in seen:
            raise ArtifactError(f"The value '{name}' of the ONNX graph depends on itself.", REMEDY)
        seen.add(id(source))
        if not source.input or not any(is_standard(source, op) for op in _FOLLOWED):
            return path, name, None
        path.append((scope, source))
        name = source.input[0]


def _weight(
    scope: Scope,
    node: NodeProto,
    index: int,
    path: _Path,
    name: str,
    tensor: TensorProto,
    place: Path | None,
    read: Callable[[TensorProto, Path | None, str], npt.NDArray[Any]] = to_numpy,
) -> CodedWeight:
    stored = read(tensor, place, name)
    shape: tuple[int, ...] = stored.shape
    steps: list[Step] = []
    dequantize: tuple[Scope, NodeProto] | None = None
    narrowed: str | None = None
    quantized = False  # floats that the graph quantizes as it runs: what follows is not what is stored
    for where, source in reversed(path):  # forwards: from the initializer to the consumer
        if source.op_type in ("Transpose", "Reshape"):
            steps.append(_step(where, source, shape, name, place))
            shape = steps[-1].shape_after(shape)
        elif source.op_type == "QuantizeLinear":
            if dequantize is not None:
                raise ArtifactError(f"Tensor '{name}' is quantized again after it was dequantized.", REMEDY)
            quantized = True
        elif source.op_type == "Cast" and dequantize is not None:
            narrowed = _narrower(source, narrowed)
        elif source.op_type == "DequantizeLinear" and not quantized:
            if dequantize is not None:
                raise ArtifactError(f"Tensor '{name}' is dequantized twice.", REMEDY)
            dequantize = where, source
            # What turns the codes before they are dequantized is done here: scales refer to the turned layout.
            for step in steps:
                stored = step.apply(stored)
            steps = []
    weight = CodedWeight(
        name=(name or f"{node.name}").removesuffix(".codes"),
        stored=stored,
        dtype=dtype_name(tensor),
        **_quantization(*dequantize, stored.shape, name, place) if dequantize else _unquantized(tensor),
        op=node.op_type,
        node=f"{node.name}",
        steps=tuple(steps),
        consumed_axis=_consumed_axis(scope, node, index, len(shape), name),
    )
    if narrowed and weight.value_dtype not in NARROW:
        weight = replace(weight, value_dtype=narrowed)
    check_quantization(weight)
    return weight


def _narrower(cast: NodeProto, so_far: str | None) -> str | None:
    """Return the type to which values were rounded on the way: a later wider cast does not bring the digits back."""
    to = next((TensorProto.DataType.Name(a.i) for a in cast.attribute if a.name == "to"), "")
    return to if to in NARROW else so_far


def _consumed_axis(scope: Scope, node: NodeProto, index: int, rank: int, name: str) -> int:
    """Return the axis that the operator sums over, in the layout that it takes."""
    trans_a, trans_b = _transposed(scope, node)
    ranks, axis = {
        "Conv": (range(3, 65), 1),  # K, C / groups, R, S, ...
        "ConvTranspose": (range(3, 65), 0),  # C, K / groups, R, S, ...
        "MatMul": (range(1, 65), max(rank - 2, 0) if index == 1 else rank - 1),  # ..., M, K  @  ..., K, N
        "Gemm": (range(2, 3), int(trans_b) if index == 1 else int(not trans_a)),
    }[node.op_type]
    if rank not in ranks:
        raise ArtifactError(f"Tensor '{name}' has {rank} axes: no weight of a {node.op_type} ('{node.name}').", REMEDY)
    return axis


def _step(scope: Scope, node: NodeProto, shape: tuple[int, ...], name: str, place: Path | None) -> Step:
    """Return a Transpose or Reshape of a constant of the given shape with its dims resolved."""
    if node.op_type == "Transpose":
        perm = scope.integers(node, "perm", range(len(shape))[::-1])
        if sorted(perm) != list(range(len(shape))):
            raise ArtifactError(f"Tensor '{name}' of shape {shape} is transposed by {perm}.", REMEDY)
        return Step("transpose", perm)
    target = _constant(scope, node, 1, f"the shape that '{name}' is reshaped to")
    asked = to_numpy(target, place, f"{name} (its new shape)").ravel().tolist()
    keep_zero = scope.integer(node, "allowzero", 0)
    dims = [shape[i] if n == 0 and not keep_zero and i < len(shape) else int(n) for i, n in enumerate(asked)]
    elements = math.prod(shape)
    if dims.count(-1) == 1:
        rest = -math.prod(dims)
        dims = [elements // rest if n == -1 and rest > 0 else n for n in dims]
    if min(dims, default=0) < 0 or math.prod(dims) != elements:
        raise ArtifactError(f"Tensor '{name}' of shape {shape} is reshaped to {asked}.", REMEDY)
    return Step("reshape", tuple(dims))


def _unquantized(tensor: TensorProto) -> dict[str, Any]:
    return {"scale": None, "zero_point": None, "axis": None, "block_size": 0, "value_dtype": dtype_name(tensor)}


def _quantization(
    scope: Scope, node: NodeProto, shape: tuple[int, ...], name: str, place: Path | None
) -> dict[str, Any]:
    """Return a DequantizeLinear's scale, zero point, axis and block size, and the type of what it makes."""
    scale_tensor = _constant(scope, node, 1, f"the scale of '{name}'")
    scale = to_numpy(scale_tensor, place, f"{name} (its scale)").astype(np.float32)
    output_dtype = scope.integer(node, "output_dtype", 0)
    common = {
        "scale": scale,
        "zero_point": None,
        "value_dtype": dtype_name(TensorProto(data_type=output_dtype)) if output_dtype else dtype_name(scale_tensor),
    }
    if len(node.input) > 2 and node.input[2]:
        zero_point = _constant(scope, node, 2, f"the zero point of '{name}'")
        common["zero_point"] = to_numpy(zero_point, place, f"{name} (its zero point)")
    block_size = scope.integer(node, "block_size", 0)
    if scale.ndim == 0 or (scale.size == 1 and not block_size):
        return common | {"axis": None, "block_size": 0}
    asked = scope.integer(node, "axis", 1)
    axis = asked + len(shape) if asked < 0 else asked
    if not 0 <= axis < len(shape) or block_size < 0:
        raise ArtifactError(
            f"Tensor '{name}' of shape {shape} is dequantized along axis {asked}, block size {block_size}.", REMEDY
        )
    return common | {"axis": axis, "block_size": block_size}


def _constant(scope: Scope, node: NodeProto, index: int, what: str) -> TensorProto:
    """Return a node's input that must be a constant, seen through Identity."""
    for _ in range(64):
        if index >= len(node.input):
            break
        scope, _, source = scope.find(node.input[index])
        if isinstance(source, TensorProto):
            return source
        if source is None or not is_standard(source, "Identity"):
            break
        node, index = source, 0
    raise ArtifactError(f"The ONNX graph computes {what} as it runs; a weight needs a constant.", REMEDY)
