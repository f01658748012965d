"""The per-layer table: what the policy planned, training measured, export placed and the engines hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slope_compile.report.data import RunData
from slope_compile.report.figures import ABSENT, number, percent, size
from slope_compile.report.markup import Content, Markup, join, tag
from slope_compile.report.tables import (
    Cell,
    absent,
    cell,
    code,
    column,
    figure_cell,
    section,
    sentences,
    status,
    sub,
    table,
    wide_cell,
)

WEIGHT = ".weight"


@dataclass(frozen=True)
class LayerRow:
    """One layer; None is what no stage has said yet."""

    name: str
    kind: str | None
    shape: tuple[int, ...]
    bits: int | None
    activation_bits: int | None
    pattern: str | None
    granularity: str | None
    density: Any
    cosine: Any
    sqnr_db: Any
    placement: str | None
    fp32_bytes: int | None
    file_bytes: int | None
    packed_bytes: int | None
    builds: Mapping[str, Mapping[str, Any]]  # target -> the build's row: its placement, reason and engine
    reasons: tuple[str, ...]

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def layer_rows(data: RunData) -> list[LayerRow]:
    """Return a row for each layer that any stage knows, in the policy's order."""
    metrics = data.metrics or {}
    plan = {row["name"]: row for row in metrics.get("plan", [])}
    measured = metrics.get("layers") or {}
    placed = _by_layer(data.layers)
    builds = {target: _by_layer(build) for target, build in data.builds.items()}
    names = dict.fromkeys([*plan, *placed, *(name for found in builds.values() for name in found)])
    return [
        _row(name, plan.get(name, {}), measured.get(name, {}), placed.get(name, {}), builds, data.packed)
        for name in names
    ]


def _by_layer(document: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    rows = document["layers"] if document else []
    return {row["name"].removesuffix(WEIGHT): row for row in rows}


def _row(
    name: str,
    plan: Mapping[str, Any],
    measured: Mapping[str, Any],
    placed: Mapping[str, Any],
    builds: Mapping[str, Mapping[str, Mapping[str, Any]]],
    packed: Mapping[str, int],
) -> LayerRow:
    built = {target: found[name] for target, found in builds.items() if name in found}
    known = {**next(iter(built.values()), {}), **placed, **plan}
    pattern = known.get("pattern")
    sizes = placed.get("bytes") or {}
    told = [plan.get("reason"), placed.get("reason")]
    if plan.get("activation_reason"):
        told.append(f"activations: {plan['activation_reason']}")
    told += [f"{target}: {row['reason']}" for target, row in built.items() if row.get("reason") not in (None, *told)]
    return LayerRow(
        name=name,
        kind=plan.get("kind") or placed.get("op"),
        shape=tuple(known.get("shape") or ()),
        bits=known.get("bits"),
        activation_bits=plan.get("activation_bits"),
        pattern=":".join(str(part) for part in pattern) if isinstance(pattern, (list, tuple)) else pattern,
        granularity=plan.get("granularity"),
        density=placed.get("density", measured.get("density")),
        cosine=measured.get("cosine"),
        sqnr_db=measured.get("sqnr_db"),
        placement=known.get("placement"),
        fp32_bytes=sizes.get("fp32"),
        file_bytes=sizes.get("file"),
        packed_bytes=packed.get(f"{name}{WEIGHT}"),
        builds=built,
        reasons=tuple(dict.fromkeys(reason for reason in told if reason)),
    )


def layers(data: RunData) -> Markup:
    """Return the per-layer table."""
    rows = layer_rows(data)
    if not rows:
        return section("layers", "Layers", absent("No stage has said anything about layers yet."))
    activated = any(row.activation_bits is not None for row in rows)
    numbers = ("Bits", *(["Activations"] if activated else []), "Pattern", "Nonzero", "Cosine", "SQNR, dB", "In ONNX")
    engines = [f"Engine, {target}" for target in data.builds]
    head: list[Content] = ["Layer", *(column(title) for title in numbers), "Placement", *engines, "Why"]
    note = (
        "Nonzero: share of codes that are not zero. Cosine: mean over filters of the cosine between latent and "
        "compressed weight. SQNR: power of the latent weights over power of the compression error; – where there is no "
        "error or no compression. In ONNX: bytes of codes and scales in the file; packed: in model.slope. Engine: what "
        "it really holds; fused: the layer that holds the codes multiplies with them too."
    )
    body = [_cells(row, list(data.builds), activated) for row in rows]
    grid = table("Every layer: treatment, fidelity, bytes, engine", head, body, sticky=True)
    return section("layers", "Layers", sentences([note]), grid)


def _cells(row: LayerRow, targets: list[str], activated: bool) -> list[Content]:
    shape = "×".join(str(extent) for extent in row.shape)
    return [
        join([code(row.name), sub(" ".join(part for part in (row.kind, shape) if part) or ABSENT)]),
        figure_cell(_width(row.bits)),
        *([figure_cell(_width(row.activation_bits))] if activated else []),
        figure_cell(row.pattern or "dense"),
        figure_cell(percent(row.density, 1)),
        figure_cell(number(row.cosine, 4)),
        figure_cell(number(row.sqnr_db, 1)),
        figure_cell(_bytes(row)),
        cell(row.placement or "not exported", style="nowrap"),
        *(_engine(row.builds.get(target), row.placement) for target in targets),
        wide_cell(join(tag("span", reason, class_="line") for reason in row.reasons) or ABSENT),
    ]


def _width(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _bytes(row: LayerRow) -> Content:
    if row.file_bytes is None:
        return ABSENT
    packed = sub(f"{size(row.packed_bytes)} packed") if row.packed_bytes is not None else None
    dense = sub(f"of {size(row.fp32_bytes)}") if row.fp32_bytes is not None else None
    return join([size(row.file_bytes), packed, dense])


def _engine(built: Mapping[str, Any] | None, exported: str | None) -> Cell:
    """What the engine holds: type, whether as declared, kernel; and the placement where it is not the export's."""
    engine = (built or {}).get("engine")
    if not built or not engine:
        return cell("not read")
    text, style = ("✓ held", "pass") if engine["held"] else ("✗ NOT as declared", "fail")
    told = status("not checked") if engine["dtype"] is None else tag("span", text, class_=f"status {style}")
    kernel = {True: "sparse kernel", False: "dense kernel"}.get(engine.get("sparse_chosen"))
    eligible = "eligible for sparse kernels" if engine.get("sparse_eligible") and not engine["sparse_chosen"] else None
    fused = {True: "fused", False: "dequantized apart"}.get(engine.get("fused")) if _is_coded(built) else None
    placement = built["placement"] if built["placement"] != exported else None
    return cell(
        tag("span", engine["dtype"] or "not found", class_="nowrap"),
        " ",
        told,
        *(sub(part) for part in (placement, fused, kernel, eligible, engine["note"]) if part),
    )


def _is_coded(built: Mapping[str, Any]) -> bool:
    return built["placement"] not in ("float", "sparse-fp16")
