"""Writes matrix products as the operator whose kernels a backend version makes eligible: Gemm or MatMul.

x [..., T, K] @ W [K, N]  =  Reshape(Gemm(Flatten(x) [-1, K], W), [..., T, N])
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from slope_compile.placement.passes.graph import add_constant, codes_of, multipliers


@dataclass(frozen=True)
class Form:
    """Which operator a placement's matrix products are written as.

    Args:
        backend: Name of the backend.
        since: Its first version of which this is said.
        placement: The placement.
        op: `Gemm`.
        source: Who says so.
    """

    backend: str
    since: tuple[int, ...]
    placement: str
    op: str
    source: str


# Where nothing is said, a product stays as exported.
FORMS = (
    Form("tensorrt", (10, 0), "sparse-fp16", "Gemm", "NVIDIA/TensorRT#2271, onnxsim PR #764: sparse FP16 needs Gemm"),
)


def wanted_form(backend: str, version: tuple[int, ...], placement: str) -> str:
    """Return the operator for a placement's matrix products: of the rows that fit, the latest version's.

    Args:
        backend: Name of the backend.
        version: Its version.
        placement: The placement.
    """
    rows = [row for row in FORMS if (row.backend, row.placement) == (backend, placement) and row.since <= version]
    return max(rows, key=lambda row: row.since).op if rows else "as exported"


class MatMulToGemm(ir.passes.InPlacePass):
    """Writes the MatMul nodes of some weights as Gemm, flattening activations of more than two axes.

    A MatMul stays where its weight is no 2-D second factor, or more than one size of its output is not known.

    Args:
        names: The weights.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = tuple(names)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the nodes."""
        modified = False
        for name in self._names:
            for node, index in multipliers(codes_of(model, name), name):
                modified |= node.op_type == "MatMul" and index == 1 and _replace(node, name)
        return ir.passes.PassResult(model, modified=modified)

    def ensures(self, model: ir.Model) -> None:
        """No MatMul is left that can be a Gemm, and a Gemm reads two axes."""
        for name in self._names:
            for node, index in multipliers(codes_of(model, name), name):
                if node.op_type == "MatMul" and index == 1 and _sizes(node) is not None:
                    raise ir.passes.PostconditionError(f"the MatMul '{node.name}' of '{name}' is no Gemm yet")
                shape = None if node.op_type != "Gemm" or node.inputs[0] is None else node.inputs[0].shape
                if shape is not None and len(shape) != 2:
                    raise ir.passes.PostconditionError(f"the Gemm '{node.name}' of '{name}' reads {len(shape)} axes")


def _sizes(node: ir.Node) -> list[int | None] | None:
    """Return the sizes of a MatMul's output but for the channels; None where it cannot be a Gemm."""
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or activation.shape is None or weight is None or weight.shape is None:
        return None
    sizes = [size if isinstance(size, int) else None for size in activation.shape[:-1]]
    fits = len(weight.shape) == 2 and len(activation.shape) > 1 and sizes.count(None) < 2
    return sizes if fits and isinstance(node.graph, ir.Graph) else None


def _replace(node: ir.Node, name: str) -> bool:
    """Replace one MatMul; return whether that could be done."""
    sizes = _sizes(node)
    if sizes is None:
        return False
    activation, weight, out, graph = node.inputs[0], node.inputs[1], node.outputs[0], node.graph
    assert activation is not None and weight is not None and isinstance(graph, ir.Graph)  # else it had no sizes
    assert activation.shape is not None
    shape, rank = activation.shape, len(activation.shape)
    if rank == 2:
        gemm = ir.node("Gemm", [activation, weight], name=node.name)
        nodes, last = [gemm], gemm
    else:
        assert weight.shape is not None
        channels = weight.shape[1]
        flat = ir.node("Flatten", [activation], {"axis": rank - 1}, name=f"{name}.flatten")
        gemm = ir.node("Gemm", [flat.outputs[0], weight], name=node.name)
        dims = np.array([-1 if size is None else size for size in sizes] + [channels], np.int64)
        target = add_constant(graph, f"{name}.shape", ir.tensor(dims))
        last = ir.node("Reshape", [gemm.outputs[0], target], name=f"{name}.reshape")
        nodes = [flat, gemm, last]
        for one, columns in ((flat, shape[-1]), (gemm, channels)):
            one.outputs[0].name = f"{one.name}.out"
            one.outputs[0].type = out.type
            one.outputs[0].shape = ir.Shape([None, columns])
    graph.insert_before(node, nodes)
    made = last.outputs[0]
    made.type, made.shape = out.type, out.shape
    ir.convenience.replace_all_uses_with(out, made, replace_graph_outputs=True)
    made.name, out.name = out.name, f"{out.name}.replaced"
    graph.remove(node, safe=True)
    return True
