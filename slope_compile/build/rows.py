"""The rows of a build's layers.json: what the export said of a layer, what became of it here, what the engine holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from slope_compile.build.holding import Held, Wanted, declared_type, find_held, node_names
from slope_compile.build.inspector import read_layers
from slope_compile.build.layers import Sparsity, parse_sparsity
from slope_compile.build.sparse import sparse_row
from slope_compile.compression.codes import kernel_note
from slope_compile.placement.choose import Place
from slope_compile.placement.rules import INT8
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.tensors import dtype_name, element_bits
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import parse_pattern
from slope_compile.targets.backends import Backend

# Parts of the names of kernels that multiply INT8 with INT8: `…_i8i8_i8i32_f32_…`, `…_i8f32_i8i32_f32_…`
INT8_KERNELS = ("i8i8", "i8i32", "int8int8")


def engine_rows(
    weights: Sequence[CodedWeight],
    places: Sequence[Place],
    graph: onnx.GraphProto,
    log: str,
    backend: Backend,
    layers: Mapping[str, Any] | None,
    inspector: str = "",
) -> list[dict[str, Any]]:
    """Return one row a layer.

    Args:
        weights: The weights of the exported model.
        places: What became of each of them, in the same order.
        graph: The graph that the backend got.
        log: The build log.
        backend: Who built.
        layers: The export's layers.json; its rows come first, in its order, then weights that it does not name.
        inspector: The engine inspector's JSON; where it has layers, they are read there and not in the log.
    """
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    wanted = [_wanted(weight, place, graph, initializers) for weight, place in zip(weights, places, strict=True)]
    held = find_held(wanted, read_layers(log, inspector)[0])
    sparsity = parse_sparsity(log)
    found = {
        weight.name: (weight, place, _engine(want.nodes[-1:], place, one, sparsity, backend))
        for weight, want, place, one in zip(weights, wanted, places, held, strict=True)
    }
    rows = []
    for row in layers["layers"] if layers else []:
        if row["name"] not in found:
            rows.append({**row, "fits_2_4": None, "engine": _absent("the ONNX file has no such weight")})
            continue
        weight, place, engine = found.pop(row["name"])
        reason = place.reason
        if place.placement == "float" and weight.codes is None:
            reason = row["reason"]  # the policy knows why it left it
        if row.get("pattern") and (note := kernel_note(*parse_pattern(row["pattern"]))):
            reason = f"{reason}; {note}"
        here = {"placement": place.placement, "reason": reason, "container": place.container}
        rows.append({**row, **here, "fits_2_4": is_sparse(weight), "engine": engine})
    return rows + [_row(*one) for one in found.values()]


def _wanted(
    weight: CodedWeight, place: Place, graph: onnx.GraphProto, initializers: Mapping[str, onnx.TensorProto]
) -> Wanted:
    """Return what the file that the backend got declares of a weight: it may be padded, turned or no longer coded."""
    coded = f"{weight.name}.codes"
    name = coded if coded in initializers else weight.name
    tensor = initializers.get(name)
    nodes = node_names(graph, name)
    if tensor is None:
        return Wanted(name, weight.stored.shape, place.container, nodes)
    return Wanted(name, tuple(tensor.dims), declared_type(graph, name, dtype_name(tensor)), nodes)


def _engine(
    operator: tuple[str, ...], place: Place, held: Held, sparsity: Sparsity, backend: Backend
) -> dict[str, Any]:
    compute = held.compute
    product, notes = _int8_product(held), [held.note]
    if place.placement in INT8 and not product:
        unknown = "whether it is multiplied with an Int8 activation was not checked: the list has no types"
        notes.append(unknown if product is None else "no layer of the engine multiplies it with an Int8 activation")
    return {
        "layer": held.layer and held.layer.name,
        "layer_type": held.layer and held.layer.kind,
        "dtype": held.constant and held.constant.dtype,
        "bytes": held.constant and held.constant.bytes,
        "computed_by": compute and compute.name,
        "tactic": compute and compute.tactic,
        "fused": held.fused,
        "fused_with": list(held.fused_with),
        **sparse_row(held, sparsity, backend, operator),
        "int8_product": product,
        "held": held.declared and (product is not False or place.placement not in INT8),
        "note": "; ".join(filter(None, notes)) or None,
    }


def _int8_product(held: Held) -> bool | None:
    """Return whether one layer multiplies the weight as Int8 with an activation that is Int8; None where unknown."""
    constant, compute = held.constant, held.compute
    if constant is None or compute is None or constant.dtype != "Int8":
        return False
    # Where another layer hands the weight over, it is one of the Int8 tensors that are read.
    if compute.input_types.count("Int8") > (held.layer != compute):
        return True
    if any(kernel in (compute.tactic or "") for kernel in INT8_KERNELS):
        return True
    # TensorRT writes `N/A due to dynamic shapes` in place of a format.
    return None if any(name.startswith("N/A") for name in compute.input_types) else False


def _absent(note: str) -> dict[str, Any]:
    keys = ("layer", "layer_type", "dtype", "bytes", "computed_by", "tactic", "fused", "sparse_eligible",
            "sparse_chosen", "sparse_note", "int8_product")  # fmt: skip
    return {**dict.fromkeys(keys), "fused_with": [], "held": False, "note": note}


def _row(weight: CodedWeight, place: Place, engine: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a weight that no export described: what can be counted in the file itself."""
    elements = weight.stored.size
    scale_bytes = 0 if weight.scale is None else weight.scale.nbytes
    sparse = is_sparse(weight)
    return {
        "name": weight.name,
        "op": weight.op,
        "placement": place.placement,
        "reason": place.reason,
        "container": place.container,
        "bits": None if weight.codes is None else element_bits(weight.dtype),
        "pattern": "2:4" if sparse else None,
        "fits_2_4": sparse,
        "shape": list(weight.stored.shape),
        "bytes": {"fp32": 4 * elements, "file": -(-elements * element_bits(weight.dtype) // 8) + scale_bytes},
        "density": int(np.count_nonzero(weight.stored)) / max(elements, 1),
        "engine": engine,
    }
