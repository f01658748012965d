"""Which nodes of a Q/DQ graph compute in half precision, and which stay float32 so that no Cast cuts an INT8 chain.

* Products (Conv, MatMul, …) of floats are half, and whatever is tied to one by float tensors becomes half with it.
* INT8 products, both factors straight from DequantizeLinear, stay float32: their arithmetic is INT8, and TensorRT finds
  them by their Q/DQ. So do the norm, bias and activation right behind one, which it does on the way out.
* What lies wholly between such products, Q/DQ, inputs and outputs of the graph stays float32: nothing there is half, so
  a Cast would gain nothing.
* A matrix product with an INT4 weight in blocks stays float32, and what is around it does not: behind a Cast the weight
  would be dequantized by a layer of its own (TensorRT-RTX 1.7.1: `ReplCastMulCastCast`, then `Fc`; without the Cast one
  `ReplCastMulCastFc`). INT8 weights are fused with a Cast too.
* Operators that do not take the type, unknown ones, those that square, sum up or hold coordinates, and those with a
  constant that half precision cannot hold (`half_constants.py`) stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from slope_compile.placement.passes.half_constants import Array, is_in_range, to_half
from slope_compile.placement.passes.slots import FLOAT, Slots, slots
from slope_compile.qdq.epilogue import EPILOGUE
from slope_compile.qdq.graph import MOVES

PRODUCTS = (
    "Conv", "ConvTranspose", "DeformConv", "MatMul", "Gemm", "Einsum", "Attention", "LSTM", "GRU", "RNN",
)  # fmt: skip
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul")
# Squares, exponentials and sums leave half's range (65504) where their inputs do not; coordinates need its digits.
_SENSITIVE = (
    "Pow", "Exp", "Log", "CumSum", "ReduceSum", "ReduceSumSquare", "ReduceProd", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "LpNormalization", "RoiAlign", "GridSample", "AffineGrid", "NonMaxSuppression",
)  # fmt: skip


def half_nodes(graph: ir.Graph, opset: int, half: ir.DataType) -> dict[ir.Node, Slots]:
    """Return the nodes that become half, each with the inputs and outputs that do.

    Args:
        graph: Its values have their types, its constants are initializers.
        opset: The model's.
        half: FLOAT16 or BFLOAT16.
    """
    flow = _flow(graph)
    able = {node: found for node in graph if (found := _able(node, opset, half, flow)) is not None}
    kept = set(_int8_chains(graph))
    islands = {node for node in graph if _multiplies_blocks(node)} - kept
    kept.update(_moves_behind_quantizers([*int8_products(graph), *islands]))
    becoming = {node for node in able if node.op_type in PRODUCTS} - kept - islands
    pending = [*becoming, *islands]
    while pending:
        for other in _tied(pending.pop()):
            if other in able and other not in becoming | kept | islands and not flow.isdisjoint(other.inputs):
                becoming.add(other)
                pending.append(other)
    becoming |= _of_constants(graph, able, becoming, flow) - kept
    becoming |= {node for node in able if _is_sink(node) and _reads_half(node, becoming)} - kept
    return {node: able[node] for node in graph if node in becoming}


def constant(value: ir.Value | None) -> Array | None:
    """Return the array of an initializer that nobody can override, else None."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _flow(graph: ir.Graph) -> set[ir.Value | None]:
    """Return the float tensors that depend on more than constants; what is made of integers counts as such."""
    flow: set[ir.Value | None] = {value for value in graph.inputs if value.dtype == FLOAT}
    for node in graph:
        read = list(_floats(node.inputs))
        if node.op_type in _QUANTIZERS or not read or not flow.isdisjoint(read):
            flow.update(_floats(node.outputs))
    return flow


def _able(node: ir.Node, opset: int, half: ir.DataType, flow: set[ir.Value | None]) -> Slots | None:
    """Return what of a node can be half, None where nothing can or a constant of it cannot."""
    found = None if node.op_type in _QUANTIZERS or node.op_type in _SENSITIVE else slots(node, opset, half)
    for index, value in enumerate(node.inputs if found is not None else ()):
        if not found.inputs[index] or value in flow:  # type: ignore[union-attr]  # no index without it
            continue
        array = constant(value)
        if array is not None and to_half(node, index, array, half) is None:
            return None
        if array is None and not all(is_in_range(root, half) for root in _roots(value)):
            return None
    return found


def _roots(value: ir.Value | None) -> Iterator[Array]:
    """Yield the float constants from which a value that depends on nothing else is computed."""
    pending, seen = [value], set[ir.Value | None]()
    while pending:
        value = pending.pop()
        array = constant(value)
        if array is not None:
            yield array
        elif value is not None and value not in seen and (node := value.producer()) is not None:
            seen.add(value)
            pending.extend(_floats(node.inputs))


def int8_products(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the products whose factors both come straight from DequantizeLinear."""
    for node in graph:
        if node.op_type in PRODUCTS and len(node.inputs) > 1 and all(map(_from_quantized, node.inputs[:2])):
            yield node


def _int8_chains(graph: ir.Graph) -> Iterator[ir.Node]:
    """Yield the INT8 products, and what TensorRT does on their way out."""
    for node in int8_products(graph):
        yield node
        after = _only_reader(node)
        while after is not None and after.op_type in EPILOGUE and _reads_nothing_else(after):
            yield after
            after = _only_reader(after)


def _moved(value: ir.Value | None) -> tuple[list[ir.Node], ir.Node | None]:
    """Return the nodes that only move a value, and the one that makes it."""
    moves: list[ir.Node] = []
    node = None if value is None else value.producer()
    while node is not None and node.op_type in MOVES and node.inputs[0] is not None:
        moves.append(node)
        node = node.inputs[0].producer()
    return moves, node


def _from_quantized(value: ir.Value | None) -> bool:
    """Return whether a value is dequantized, with nothing behind that but what moves it."""
    _, node = _moved(value)
    return node is not None and node.op_type == "DequantizeLinear"


def _moves_behind_quantizers(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Yield what stands between DequantizeLinear and products that stay float32."""
    for node in nodes:
        for value in node.inputs[:2]:
            if _from_quantized(value):
                yield from _moved(value)[0]


def _only_reader(node: ir.Node) -> ir.Node | None:
    readers = [use.node for use in node.outputs[0].uses()]
    return readers[0] if len(readers) == 1 and not node.outputs[0].is_graph_output() else None


def _reads_nothing_else(node: ir.Node) -> bool:
    """Return whether an epilogue reads one tensor, and constants or dequantized ones beside it."""
    floats = [value for value in _floats(node.inputs) if constant(value) is None]
    return sum(not _from_quantized(value) for value in floats) == 1


def _multiplies_blocks(node: ir.Node) -> bool:
    """Return whether a node is a matrix product whose weight is INT4 in blocks."""
    if node.op_type not in ("MatMul", "Gemm"):
        return False
    for _, source in map(_moved, node.inputs[:2]):
        if source is not None and source.op_type == "DequantizeLinear" and source.inputs[0] is not None:
            block_size: int | None = source.attributes.get_int("block_size")
            if block_size and source.inputs[0].dtype in (ir.DataType.INT4, ir.DataType.UINT4):
                return True
    return False


def _tied(node: ir.Node) -> Iterator[ir.Node]:
    """Yield the nodes that hand floats to a node, and those that it hands floats to."""
    for value in _floats(node.inputs):
        if (source := value.producer()) is not None:
            yield source
    for value in _floats(node.outputs):
        yield from (use.node for use in value.uses() if not _is_sink(use.node))


def _of_constants(
    graph: ir.Graph, able: Mapping[ir.Node, Slots], becoming: set[ir.Node], flow: set[ir.Value | None]
) -> set[ir.Node]:
    """Return the nodes of constants alone whose every reader is half: for another one they must keep their digits."""
    found: set[ir.Node] = set()
    for node in reversed(graph):
        if node in able and node not in becoming and flow.isdisjoint(node.inputs):
            users = [use.node for value in _floats(node.outputs) for use in value.uses()]
            answers = any(value.is_graph_output() for value in node.outputs)
            if users and not answers and all(user in becoming or user in found for user in users):
                found.add(node)
    return found


def _is_sink(node: ir.Node) -> bool:
    """Return whether a node makes no floats, as Shape and Greater do: it takes whichever type comes."""
    return not any(True for _ in _floats(node.outputs))


def _reads_half(node: ir.Node, becoming: set[ir.Node]) -> bool:
    read = [value for value in _floats(node.inputs) if constant(value) is None]
    return bool(read) and all(value.producer() in becoming for value in read)


def _floats(values: Iterable[ir.Value | None]) -> Iterator[ir.Value]:
    return (value for value in values if value is not None and value.dtype == FLOAT)
