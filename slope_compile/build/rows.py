"""The rows of a build's layers.json: what the export said of a layer, what became of it here, what the engine holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from slope_compile.build.holding import Held, Wanted, find_held, node_names
from slope_compile.build.layers import EngineLayer, Sparsity, parse_layers, parse_sparsity
from slope_compile.compression.codes import kernel_note
from slope_compile.placement.choose import Place
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.tensors import element_bits
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import parse_pattern
from slope_compile.targets.backends import Backend

AT_RUN_TIME = "not checked: TensorRT-RTX chooses kernels at run time"
INT8_PLACEMENTS = ("sparse-int8", "int8")
NO_LINES = "not checked: the build log has no (Sparsity) lines"


def engine_rows(
    weights: list[CodedWeight],
    places: list[Place],
    graph: onnx.GraphProto,
    log: str,
    backend: Backend,
    layers: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Return one row a layer.

    Args:
        weights: The weights of the exported model.
        places: What became of each of them, in the same order.
        graph: The graph that the backend got.
        log: The build log.
        backend: Who built.
        layers: The export's layers.json; its rows come first, in its order, then weights that it does not name.
    """
    initializers = {tensor.name for tensor in graph.initializer}
    wanted = []
    for weight, place in zip(weights, places, strict=True):
        coded = f"{weight.name}.codes"
        initializer = coded if coded in initializers else weight.name
        wanted.append(Wanted(initializer, weight.stored.shape, place.container, node_names(graph, initializer)))
    sparsity = parse_sparsity(log)
    held = find_held(wanted, parse_layers(log))
    found = {
        weight.name: (weight, place, _engine(one, place, sparsity, backend))
        for weight, place, one in zip(weights, places, held, strict=True)
    }
    rows = []
    for row in layers["layers"] if layers else []:
        if row["name"] in found:
            _, place, engine = found.pop(row["name"])
            reason = row["reason"] if place.placement == "float" else place.reason  # the policy knows why it left it
            if row.get("pattern") and (note := kernel_note(*parse_pattern(row["pattern"]))):
                reason = f"{reason}; {note}"
            here = {"placement": place.placement, "reason": reason, "container": place.container}
            rows.append({**row, **here, "engine": engine})
        else:
            rows.append({**row, "engine": _absent("the ONNX file has no such weight")})
    return rows + [_row(*one) for one in found.values()]


def summarize(rows: list[dict[str, Any]], log: str, backend: Backend) -> dict[str, Any]:
    """Return the counts: coded layers, those held as declared, types in the engine, INT8 products, sparse kernels.

    Args:
        rows: As `engine_rows` returned them.
        log: The build log.
        backend: Who built.
    """
    coded = [row for row in rows if row["placement"] != "float"]
    sparsity = parse_sparsity(log)
    silent = sparsity.eligible is None and sparsity.chosen is None
    source = (AT_RUN_TIME if backend.rtx else NO_LINES) if silent else "log line"
    return {
        "coded": len(coded),
        "held": sum(row["engine"]["held"] for row in coded),
        "not_held": [row["name"] for row in coded if not row["engine"]["held"]],
        "types": dict(sorted(Counter(row["engine"]["dtype"] or "not found" for row in rows).items())),
        "weight_bytes": sum(row["engine"]["bytes"] or 0 for row in rows),
        "int8": {
            "declared": sum(row["placement"] in INT8_PLACEMENTS for row in rows),
            "multiplied": sum(bool(row["engine"]["int8_product"]) for row in rows),
        },
        "sparse": {"eligible": sparsity.eligible, "chosen": sparsity.chosen, "source": source},
    }


def _engine(held: Held, place: Place, sparsity: Sparsity, backend: Backend) -> dict[str, Any]:
    compute, note = held.compute, held.note
    product = _int8_product(held)
    if place.placement in INT8_PLACEMENTS and not product:
        note = "; ".join(filter(None, [note, "no layer of the engine multiplies it with an Int8 activation"]))
    return {
        "layer": held.layer and held.layer.name,
        "layer_type": held.layer and held.layer.kind,
        "dtype": held.constant and held.constant.dtype,
        "bytes": held.constant and held.constant.bytes,
        "computed_by": compute and compute.name,
        "tactic": compute and compute.tactic,
        "sparse_kernel": None if backend.rtx else _sparse_kernel(compute, sparsity),
        "int8_product": product,
        "held": held.declared and (product or place.placement not in INT8_PLACEMENTS),
        "note": note,
    }


def _int8_product(held: Held) -> bool:
    """Return whether one layer reads both the weight's constant as Int8 and an activation as Int8."""
    constant, compute = held.constant, held.compute
    if constant is None or compute is None or constant.dtype != "Int8":
        return False
    return held.layer == compute and "Int8" in compute.input_types


def _sparse_kernel(compute: EngineLayer | None, sparsity: Sparsity) -> bool | None:
    """Return whether a layer's kernel is a sparse one, None where neither the tactic nor the log says it."""
    if compute is None or (compute.tactic is None and sparsity.chosen is None):
        return None
    return "spars" in (compute.tactic or "").lower() or compute.name in sparsity.chosen_names


def _absent(note: str) -> dict[str, Any]:
    keys = ("layer", "layer_type", "dtype", "bytes", "computed_by", "tactic", "sparse_kernel", "int8_product")
    return {**dict.fromkeys(keys), "held": False, "note": note}


def _row(weight: CodedWeight, place: Place, engine: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a weight that no export described: what can be counted in the file itself."""
    elements = weight.stored.size
    scale_bytes = 0 if weight.scale is None else weight.scale.nbytes
    return {
        "name": weight.name,
        "op": weight.op,
        "placement": place.placement,
        "reason": place.reason,
        "container": place.container,
        "bits": None if weight.codes is None else element_bits(weight.dtype),
        "pattern": "2:4" if is_sparse(weight) else None,
        "shape": list(weight.stored.shape),
        "bytes": {"fp32": 4 * elements, "file": -(-elements * element_bits(weight.dtype) // 8) + scale_bytes},
        "density": int(np.count_nonzero(weight.stored)) / max(elements, 1),
        "engine": engine,
    }
