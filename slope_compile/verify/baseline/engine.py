"""The engine against the baseline's: speed where `bench` measured both, sparse kernels, compressed layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slope_compile.artifacts import RunFolder
from slope_compile.verify.baseline.runs import OURS, THEIRS, Compared, not_readable
from slope_compile.verify.verdict import Check, NotCheckedError, listed, significant

LATENCY, SPARSE, LAYERS = "baseline.latency", "baseline.sparse", "baseline.layers"
Rows = Mapping[str, Mapping[str, Any]]  # weight name -> row of a build's layers.json


def check_latency(compared: Compared) -> Check:
    """`baseline.latency`: median latency of the engine, as `bench` kept it of both on GPUs of the same name."""
    name = f"bench/{compared.target}/bench.json"
    ours, theirs = compared.both(name)
    now, before = (
        _speed(compared, compared.ours, ours, OURS),
        _speed(compared, compared.theirs, theirs, THEIRS),
    )
    for what in ("gpu", "batch", "shapes"):
        if now[what] != before[what]:
            raise NotCheckedError(f"the {what} is not the same: {now[what]}, of the baseline {before[what]}")
    growth = now["p50"] / before["p50"] - 1
    budget = compared.budgets.latency
    figures = {
        "baseline": compared.theirs.path.name, "gpu": now["gpu"], "batch": now["batch"], "p50_ms": now["p50"],
        "baseline_p50_ms": before["p50"], "growth": significant(growth), "budget": budget,
    }  # fmt: skip
    detail = (
        f"median {now['p50']:.3f} ms at batch {now['batch']} on {now['gpu']}, the baseline's {before['p50']:.3f} ms "
        f"({100 * growth:+.2f} %, allowed {100 * budget:+g} %)"
    )
    return Check(LATENCY, "pass" if growth <= budget else "fail", detail, figures)


def _speed(compared: Compared, run: RunFolder, bench: Any, whose: str) -> dict[str, Any]:
    """Return what a bench.json says of the engine that the run has now.

    Raises:
        NotCheckedError: If it speaks of another engine, or the baseline's is no bench.json of ours.
        ArtifactError: If this run's is none.
    """
    record = run.records.get(compared.build)
    engine = None if record is None else record.outputs.get(f"{compared.build}/model.engine")
    try:
        if engine is None or bench["engine_sha256"] != engine.sha256:
            raise NotCheckedError(f"{whose} was measured with another engine than it has now: run `bench` again")
        found = {
            "gpu": str(bench["gpu"]["name"]),
            "batch": bench["batch"],
            "shapes": bench["shapes"],
            "p50": float(bench["engine"]["latency_ms"]["p50"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise not_readable(whose, f"bench.json of {whose} is none of ours: {error}", "Run `bench` again.") from None
    if not found["p50"] > 0:
        raise not_readable(whose, f"bench.json of {whose} has a median of {found['p50']} ms", "Run `bench` again.")
    return found


def check_sparse(compared: Compared) -> Check:
    """`baseline.sparse`: the layers that had a sparse kernel in the baseline's engine have one in this one."""
    ours, theirs = compared.both(f"{compared.build}/layers.json")
    for whose, built in ((OURS, ours), (THEIRS, theirs)):
        _require_known(whose, built)
    now, before = _rows(ours, OURS), _rows(theirs, THEIRS)
    had = [name for name, row in before.items() if row["engine"]["sparse_chosen"]]
    lost = [name for name in had if not now.get(name, {"engine": {"sparse_chosen": None}})["engine"]["sparse_chosen"]]
    gained = [name for name, row in now.items() if row["engine"]["sparse_chosen"] and name not in had]
    budget = compared.budgets.sparse_layers
    figures = {"baseline": compared.theirs.path.name, "had": len(had), "lost": lost, "gained": gained, "budget": budget}
    if not lost:
        detail = f"all {len(had)} layers with a sparse kernel in the baseline's engine have one; {len(gained)} more do"
    else:
        detail = f"{len(lost)} of {len(had)} layers lost their sparse kernel, allowed {budget}: {listed(lost)}"
    return Check(SPARSE, "pass" if len(lost) <= budget else "fail", detail, figures)


def _require_known(whose: str, built: Any) -> None:
    try:
        sparse = built["summary"]["sparse"]
        chosen, by = sparse["chosen"], str(sparse["chosen_by"])
    except (KeyError, TypeError):
        raise NotCheckedError(f"layers.json of {whose} does not count sparse kernels: build it again") from None
    if chosen is None:
        raise NotCheckedError(f"the kernels of {whose} are not known: {by.removeprefix('not checked: ')}")


def check_layers(compared: Compared) -> Check:
    """`baseline.layers`: no layer compressed in the baseline's engine is float, wider or not held in this one."""
    ours, theirs = compared.both(f"{compared.build}/layers.json")
    now, before = _rows(ours, OURS), _rows(theirs, THEIRS)
    had = {name: row for name, row in before.items() if row["placement"] != "float"}
    lost = {name: why for name, row in had.items() if (why := _lost(row, now.get(name)))}
    figures = {"baseline": compared.theirs.path.name, "layers": len(had), "lost": list(lost)}
    if lost:
        told = listed(f"{name}: {why}" for name, why in lost.items())
        return Check(LAYERS, "fail", f"{len(lost)} of {len(had)} layers lost compression: {told}", figures)
    return Check(LAYERS, "pass", f"all {len(had)} layers compressed in the baseline's engine still are", figures)


def _lost(before: Mapping[str, Any], now: Mapping[str, Any] | None) -> str:
    """Say what a layer lost; empty if nothing."""
    if now is None:
        return "not in this engine"
    if now["placement"] == "float":
        return f"float, in the baseline {before['placement']}"
    if before["bits"] is not None and now["bits"] is not None and now["bits"] > before["bits"]:
        return f"{now['bits']} bits, in the baseline {before['bits']}"
    if before["pattern"] is not None and now["pattern"] is None:
        return f"dense, in the baseline {before['pattern']}"
    if before["engine"]["held"] and now["engine"]["dtype"] is not None and not now["engine"]["held"]:
        return f"held as {now['engine']['dtype']}, not as placed ({now['placement']})"
    return ""


def _rows(built: Any, whose: str) -> Rows:
    """Return the layers of a build's layers.json by weight name.

    Raises:
        ArtifactError: If this run's is not a build's.
        NotCheckedError: If the baseline's is not.
    """
    try:
        rows: Rows = {str(row["name"]): row for row in built["layers"]}
        for row in rows.values():
            _ = row["placement"], row["bits"], row["pattern"]
            _ = row["engine"]["sparse_chosen"], row["engine"]["held"], row["engine"]["dtype"]
        return rows
    except (KeyError, TypeError) as error:
        problem = f"layers.json of {whose} is not a build's: {error}"
        raise not_readable(whose, problem, "Build the engine again.") from None
