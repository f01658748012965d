"""The rows of a build's layers.json, made again from the files that they speak of, and compared.

From the exported ONNX file: name, operator, shape, bytes, density, bits, pattern, whether it fits 2:4. From the placed
one: container and placement. From the build log, where the engine's layer list was read there: all that is said of the
engine. From the export's layer list, where there is one: what only the recipe decided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from slope_compile.build.rows import engine_rows
from slope_compile.placement.choose import Place
from slope_compile.placement.rules import FLOATS
from slope_compile.qdq.activations import is_quantized
from slope_compile.qdq.checks import check_pattern, check_range
from slope_compile.qdq.graph import scopes
from slope_compile.qdq.matrices import GEMM
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.reader import iter_weights, trace_constant, weight_inputs
from slope_compile.qdq.tensors import element_bits, load_graph
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import parse_pattern
from slope_compile.targets.backends import Backend

HALVES = ("FLOAT16", "BFLOAT16")
ASKED = "asked for by build.placement"  # in the reason of a placement that the recipe names
_DENSITY = 1e-12  # counted alike, divided alike: what is left is how JSON writes a float
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Stored:
    """What was counted on one weight of the exported file; its numbers are gone.

    Args:
        like: The weight, its numbers replaced by a zero that takes no memory.
        scale_bytes: Of its scales.
        nonzeros: How many numbers are not 0.
        sparse: Whether it fits 2:4.
        broken: What it breaks of the bits and the pattern that its row declares, in words.
        quantized: Whether all its operators read a quantized activation.
    """

    like: CodedWeight
    scale_bytes: int
    nonzeros: int
    sparse: bool
    broken: tuple[str, ...]
    quantized: bool


def count_weights(onnx: Path, rows: Mapping[str, Row]) -> list[Stored]:
    """Count every weight of a file, one at a time.

    Args:
        onnx: The exported file.
        rows: By name: they declare bits and pattern.
    """
    quantized = reads_integers(load_graph(onnx))
    found = []
    for weight in iter_weights(onnx):
        row = rows.get(weight.name, {})
        broken = [] if row.get("bits") is None else check_range(weight, int(row["bits"]))
        if row.get("pattern") is not None:
            broken += check_pattern(weight, *parse_pattern(row["pattern"]))
        nothing = np.broadcast_to(np.zeros((), weight.stored.dtype), weight.stored.shape)
        found.append(
            Stored(
                like=replace(weight, stored=nothing),
                scale_bytes=0 if weight.scale is None else weight.scale.nbytes,
                nonzeros=int(np.count_nonzero(weight.stored)),
                sparse=is_sparse(weight),
                broken=tuple(map(str, broken)),
                quantized=quantized.get((weight.name, weight.op), False),
            )
        )
        del weight  # the next one is read into what this one had
    return found


def stored_rows(stored: Sequence[Stored], rows: Mapping[str, Row]) -> Iterator[str]:
    """Yield where rows are not what the exported file holds.

    Args:
        stored: What was counted there.
        rows: By name.
    """
    for one in stored:
        weight, row = one.like, rows[one.like.name]
        size = weight.stored.size
        packed = -(-size * element_bits(weight.dtype) // 8)
        counted = {
            "shape": list(weight.stored.shape),
            "bytes": {"fp32": 4 * size, "file": packed + one.scale_bytes},
            "fits_2_4": one.sparse,
        }
        yield from (f"{weight.name}: {key} is {row[key]}, counted {v}" for key, v in counted.items() if row[key] != v)
        density = one.nonzeros / max(size, 1)
        if abs(row["density"] - density) > _DENSITY:
            yield f"{weight.name}: density is {row['density']}, counted {density}"
        if row["op"] != weight.op and not {row["op"], weight.op} <= set(GEMM):  # a MatMul may become a Gemm
            yield f"{weight.name}: op is {row['op']}, the file multiplies in a {weight.op}"
        if weight.codes is None and row["bits"] is not None:
            yield f"{weight.name}: bits is {row['bits']}, the file holds {weight.dtype}"
        yield from one.broken


def placement_problems(
    stored: Sequence[Stored], rows: Mapping[str, Row], placed: Path, precision: str
) -> Iterator[str]:
    """Yield where rows say of a placement what the placed file does not show.

    Args:
        stored: What was counted on the exported file.
        rows: By name.
        placed: The file that the backend got.
        precision: Of the activations that are not quantized.
    """
    before: dict[str, list[Stored]] = {}
    for one in stored:
        before.setdefault(one.like.name, []).append(one)
    seen = set()
    for weight in iter_weights(placed):
        name, dtype = weight.name, weight.dtype
        seen.add(name)
        uses = before.get(name)
        if uses is None:
            yield f"{name}: a weight of {placed.name} that the exported file does not have"
            continue
        row = rows[name]
        shown = {found for one in uses for found in _shown(one, weight.codes is not None, dtype)}
        if row["placement"] not in shown:
            yield f"{name}: placement is {row['placement']}, {placed.name} shows {' or '.join(sorted(shown))}"
        elif row["placement"] == "int8" and uses[0].sparse and ASKED not in row["reason"]:
            yield f"{name}: placement is int8, though its codes are 2:4 and nobody asked for it"
        kept = dtype if weight.codes is not None else _constant(uses[0].like, precision)
        if row["container"] != kept:
            yield f"{name}: container is {row['container']}, {placed.name} holds {kept}"
        del weight
    yield from (f"{name}: a weight that {placed.name} does not have" for name in before if name not in seen)


def engine_problems(
    stored: Sequence[Stored],
    rows: Sequence[Row],
    placed: Path,
    log: str,
    backend: Backend,
    export: Mapping[str, Any] | None,
    from_log: bool,
) -> Iterator[str]:
    """Yield where rows are not those that this build log gives.

    Args:
        stored: What was counted on the exported file.
        rows: In their order.
        placed: The file that the backend got.
        log: The build log.
        backend: Who built.
        export: The export's layer list, where there is one.
        from_log: Whether the engine's layers were read in the log; else nothing of the engine is compared.
    """
    by_name = {row["name"]: row for row in rows}
    places = [_place(by_name[one.like.name]) for one in stored]
    graph = load_graph(placed).graph
    expected = engine_rows([one.like for one in stored], places, graph, log, backend, export)
    names, wanted = [row["name"] for row in rows], [row["name"] for row in expected]
    if names != wanted:
        yield f"the rows are {names}, the file's {wanted}"
        return
    declared = {row["name"]: row for row in export["layers"]} if export else {}
    ours = {one.like.name: one for one in stored}
    for row, made in zip(rows, expected, strict=True):
        name = row["name"]
        compared = ["engine"] if from_log or name not in ours else []
        if name in declared:  # counted by the export; a row of ours was counted again before
            compared += ["op", "bits", "pattern", "shape", "bytes", "density"]
        elif row["bits"] != made["bits"] or row["pattern"] != ("2:4" if ours[name].sparse else None):
            yield f"{name}: {row['bits']} bits and pattern {row['pattern']}, which the file does not show"
        if name not in ours:
            compared += ["placement", "container", "reason", "fits_2_4"]
        for key in compared:
            if row[key] != made[key]:
                yield f"{name}: {key} is {_told(row[key], made[key])}"
        if extra := sorted(set(row) ^ set(made)):
            yield f"{name}: has, or lacks, {', '.join(extra)}"


def _told(found: Any, made: Any) -> str:
    """Say how two values differ: of mappings, the keys that do."""
    if isinstance(found, dict) and isinstance(made, dict):
        keys = sorted(key for key in {*found, *made} if found.get(key) != made.get(key))
        return "; ".join(f"{key} {found.get(key)!r}, made again {made.get(key)!r}" for key in keys)
    return f"{found!r}, made again {made!r}"


def _shown(one: Stored, coded: bool, dtype: str) -> set[str]:
    """Return the placements that a weight of the placed file may have."""
    if one.like.codes is None:
        return {"float"}
    if not coded:
        return {"float", "sparse-fp16"} if one.sparse and dtype in HALVES else {"float"}
    if dtype == "INT4":
        return {"int4-weight" if one.like.op in GEMM else "int4-storage"}
    if not one.quantized:
        return {"int8-weight"}
    return {"sparse-int8", "int8"} if one.sparse else {"int8"}


def _constant(weight: CodedWeight, precision: str) -> str:
    """Return the type that a constant is placed in; a Cast may stand behind it."""
    return weight.dtype if weight.codes is None and weight.dtype != "FLOAT" else FLOATS[precision]


def _place(row: Row) -> Place:
    return Place(row["container"], row["placement"], row["reason"])


def reads_integers(model: ModelProto) -> dict[tuple[str, str], bool]:
    """Return, by weight and operator, whether every such operator reads a quantized activation.

    Args:
        model: As `load_graph` returns it.
    """
    found: dict[tuple[str, str], bool] = {}
    for scope in scopes(model):
        for node in scope.nodes:
            for index in weight_inputs(node):
                _, name, tensor = trace_constant(scope, node.input[index])
                if tensor is not None:
                    key = (name or node.name).removesuffix(".codes"), node.op_type
                    here = any(is_quantized(scope, one) for one in node.input[:2])
                    found[key] = found.get(key, True) and here
                    break
    return found
