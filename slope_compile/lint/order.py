"""Whether the graph is one at all: every value is made before it is read, and something comes out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import GraphProto, NodeProto

from slope_compile.lint.rules import Hit, rule
from slope_compile.lint.view import View


@rule(
    "order",
    "error",
    "Every value is made before it is read, and the model returns something",
    'onnx/docs/IR.md, Graphs: nodes "must be topologically sorted", a value is made once; onnx.checker says the same',
    "Export the model again, or sort its nodes (onnx_ir.passes.common.TopologicalSortPass).",
)
def order(view: View) -> Iterator[Hit]:
    """Inputs that nothing makes, cycles, outputs that nothing makes, no outputs."""
    graph = view.model.graph
    lost = list(_lost(graph, frozenset()))
    for function in view.model.functions:
        lost += _lost_in(function.node, set(function.input), f"function {function.name}")
    if lost:
        where, name = lost[0]
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        yield Hit(where, f"reads '{name}', which nothing makes before it{more}")
    if not graph.output:
        yield Hit(graph.name or "the graph", "has no outputs")


def _lost(graph: GraphProto, outer: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield who reads what, for every value of a graph that is not there yet."""
    known = set(outer) | {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    yield from _lost_in(graph.node, known, "")
    yield from ((f"output of {graph.name or 'the graph'}", one.name) for one in graph.output if one.name not in known)


def _lost_in(nodes: Iterable[NodeProto], known: set[str], where: str) -> Iterator[tuple[str, str]]:
    """Yield the same for nodes in their order; what they make is added to `known`."""
    for node in nodes:
        name = str(node.name or f"{node.op_type} of '{next(iter(node.output), '')}'")
        yield from ((f"{where} {name}".strip(), one) for one in node.input if one and one not in known)
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _lost(inner, frozenset(known))
        known.update(node.output)
