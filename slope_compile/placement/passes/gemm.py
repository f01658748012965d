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
        op: `Gemm`, or `as exported`: whichever of both the file has.
        source: Who says so.
    """

    backend: str
    since: tuple[int, ...]
    placement: str
    op: str
    source: str


FORMS = (
    Form("tensorrt", (10, 0), "sparse-fp16", "Gemm", "NVIDIA/TensorRT#2271, onnxsim PR #764: sparse FP16 needs Gemm"),
    Form("tensorrt", (10, 0), "sparse-int8", "as exported", "NVIDIA/TensorRT#2271: MatMul is eligible with INT8"),
    Form("tensorrt", (10, 14), "sparse-int8", "as exported", "Model-Optimizer PR #1664: MatMul chosen with 10.14.1"),
    Form("tensorrt", (10, 0), "int4-weight", "as exported", "Model-Optimizer: INT4 for MatMul and Gemm"),
    Form("tensorrt-rtx", (1, 0), "int4-weight", "as exported", "tried with 1.7.1: both are fused"),
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


def _replace(node: ir.Node, name: str) -> bool:
    """Replace one MatMul; return whether that could be done."""
    activation, weight, out, graph = node.inputs[0], node.inputs[1], node.outputs[0], node.graph
    shape = activation.shape if activation is not None else None
    if activation is None or weight is None or shape is None or not isinstance(graph, ir.Graph):
        return False
    rank = len(shape)
    matrix = weight.shape is not None and len(weight.shape) == 2
    sizes = [size if isinstance(size, int) else None for size in shape[:-1]]
    if not matrix or rank < 2 or sizes.count(None) > 1:
        return False
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
