"""What a run folder holds, in numbers: stages, layers, sizes, metrics. For `inspect`, `run` and the report."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slope_compile.artifacts import FileDigest, RunFolder, write_atomically
from slope_compile.metric_names import compared
from slope_compile.recipe import load_recipe

FLOAT_BYTES = 4


def summarize(folder: RunFolder) -> dict[str, Any]:
    """Return stages, per-layer rows, sizes and metrics of a run; what is not there, or damaged, is null.

    `engines` holds, for each target that was built, the line that counts what its engine holds.
    `accuracies` holds the primary metric, whose name is `metric`: accuracy, or a detector's `mask_map` or `box_map`;
    `other_metrics` likewise what else the run is judged by.
    """
    metrics, layers = _json(folder, "train/metrics.json"), _json(folder, "export/layers.json")
    metric = metrics["metric"] if metrics else "accuracy"
    return {
        "run": str(folder.path),
        "stages": {stage: record.to_json() for stage, record in sorted(folder.records.items())},
        "layers": _layer_rows(folder, metrics, layers),
        "engines": {target: built["summary"].get("line") for target, built in _builds(folder).items()},
        "sizes": _sizes(folder, metrics, layers),
        "metric": metric,
        "accuracies": _measured(folder, metrics, metric),
        "other_metrics": {name: _measured(folder, metrics, name) for name in compared(metric)[1:]},
    }


def verdict_of(folder: RunFolder, targets: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the verdict over the verified targets (or those given) in verify.json's form, each check with target."""
    chosen = list(dict.fromkeys(targets) if targets else _targets(folder, "verify"))
    verdicts = {target: _json(folder, f"verify/{target}/verify.json") for target in chosen}
    present = {target: verdict for target, verdict in verdicts.items() if verdict}
    checks = [{**check, "target": target} for target, verdict in present.items() for check in verdict["checks"]]
    if not present:
        return {"verdict": "not checked", "checks": []}
    failed = len(present) < len(chosen) or any(verdict["verdict"] != "pass" for verdict in present.values())
    return {"verdict": "fail" if failed else "pass", "checks": checks}


def build_of(folder: RunFolder, stage: str) -> dict[str, Any]:
    """Return what the engine of a finished `build/TARGET` holds: its layers.json."""
    layers: dict[str, Any] = _json(folder, f"{stage}/layers.json")
    return layers


def write_report(folder: RunFolder) -> Path:
    """Write report.html from what the run folder holds, and return its path."""
    from slope_compile.report.page import RunData, SizeRow, render

    summary = summarize(folder)
    page = render(
        RunData(
            name=folder.path.name,
            recipe=load_recipe(folder.path / "recipe.yaml").model_dump(mode="json"),
            metrics=_json(folder, "train/metrics.json"),
            layers=_json(folder, "export/layers.json"),
            builds=_builds(folder),
            verdicts={
                t: found for t in _targets(folder, "verify") if (found := _json(folder, f"verify/{t}/verify.json"))
            },
            sizes=[SizeRow(*row) for row in _size_rows(folder, summary["sizes"])],
            metric=summary["metric"],
            accuracies=summary["accuracies"],
            other_metrics=summary["other_metrics"],
            versions=_versions(folder),
        )
    )
    path = folder.path / "report.html"
    write_atomically(path, page)
    return path


def _targets(folder: RunFolder, kind: str) -> list[str]:
    return sorted(stage.partition("/")[2] for stage in folder.records if stage.startswith(f"{kind}/"))


def _builds(folder: RunFolder) -> dict[str, Any]:
    """Return layers.json of every target that was built."""
    return {t: found for t in _targets(folder, "build") if (found := _json(folder, f"build/{t}/layers.json"))}


def _json(folder: RunFolder, name: str) -> Any:
    """Return a finished stage's JSON file; None where there is none, or where it is not the one that was committed.

    A damaged file is not parsed: saying so is the business of the `digest` check and of the next stage.
    """
    record = folder.records.get(name.rpartition("/")[0])
    path = folder.path / name
    if record is None or not path.is_file() or FileDigest.of(path) != record.outputs.get(name):
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _layer_rows(folder: RunFolder, metrics: Any, layers: Any) -> list[dict[str, Any]]:
    """Join what the policy planned, training measured, export placed and the engines hold: one row a layer."""
    if metrics is None:
        return []
    placed = {row["name"]: row for row in layers["layers"]} if layers else {}
    built = {target: {row["name"]: row for row in one["layers"]} for target, one in _builds(folder).items()}
    rows = []
    for planned in metrics["plan"]:
        weight = f"{planned['name']}.weight"
        export = placed.get(weight, {})
        rows.append(
            {
                **planned,
                **metrics["layers"].get(planned["name"], {}),
                "placement": export.get("placement"),
                "bytes": export.get("bytes"),
                "engine": {target: found.get(weight, {}).get("engine") for target, found in built.items()},
                "placed": {target: _placed(found[weight]) for target, found in built.items() if weight in found},
            }
        )
    return rows


def _placed(row: Any) -> dict[str, Any]:
    return {"placement": row["placement"], "reason": row["reason"]}


def _sizes(folder: RunFolder, metrics: Any, layers: Any) -> dict[str, Any]:
    """Return bytes and ratios to FP32 of the coded weights and of the whole model.

    `nominal` counts bits × kept positions (n of m), without position metadata or scales; `packed` is a file's size and
    so is null until a packed file exists; `file` is what the ONNX file takes.
    """
    record = folder.records.get("export")
    if record is None or metrics is None or layers is None:
        return {}
    coded = [row for row in layers["layers"] if row["bits"] is not None]
    fp32_weights = sum(row["bytes"]["fp32"] for row in coded)
    nominal = sum(_nominal_bytes(row) for row in coded)
    fp32_model = metrics["fp32_bytes"]
    rest = fp32_model - fp32_weights
    file_bytes = sum(d.size for path, d in record.outputs.items() if path.startswith("export/model.onnx"))

    def row(weights: int, model: int) -> dict[str, Any]:
        return {
            "weights": weights,
            "model": model,
            "weights_ratio": round(fp32_weights / weights, 3) if weights else None,
            "model_ratio": round(fp32_model / model, 3),
        }

    return {
        "fp32": row(fp32_weights, fp32_model),
        "nominal": row(nominal, nominal + rest),
        "packed": None,
        "file": row(sum(r["bytes"]["file"] for r in coded), file_bytes),
    }


def _nominal_bytes(row: Any) -> int:
    n, m = (int(part) for part in row["pattern"].split(":")) if row["pattern"] else (1, 1)
    elements = row["bytes"]["fp32"] // FLOAT_BYTES
    return int(-(-elements * n * row["bits"] // (8 * m)))  # a broken byte is a byte


def _measured(folder: RunFolder, metrics: Any, metric: str) -> dict[str, float | None]:
    """Return a metric of the FP32 model, the compressed model and the ONNX file."""
    onnx = None
    for target in _targets(folder, "verify"):
        verdict = _json(folder, f"verify/{target}/verify.json") or {"checks": []}
        figures: dict[str, Any] = next(
            (check["figures"] for check in verdict["checks"] if check["name"] == "metric"), {}
        )
        onnx = figures.get(metric, figures).get("onnx", onnx)  # the primary metric's stand outside, others below theirs
    return {
        "fp32": metrics and metrics["fp32"][metric],
        "compressed": metrics and metrics["compressed"][metric],
        "onnx": onnx,
    }


def _size_rows(folder: RunFolder, sizes: dict[str, Any]) -> list[tuple[str, str, int]]:
    rows: list[tuple[str, str, int]] = []
    if sizes:
        rows.append(("train", "FP32 model", sizes["fp32"]["model"]))
        rows.append(("train", "nominal: bits x kept weights", sizes["nominal"]["model"]))
    for stage, file, what in (
        ("train", "codes.safetensors", "codes, one byte each"),
        ("export", "model.onnx", "ONNX file"),
    ):
        if record := folder.records.get(stage):
            rows.append(
                (stage, what, sum(d.size for p, d in record.outputs.items() if p.startswith(f"{stage}/{file}")))
            )
    for target in _targets(folder, "build"):
        outputs = folder.records[f"build/{target}"].outputs
        rows.append((f"build/{target}", "TensorRT engine", outputs[f"build/{target}/model.engine"].size))
    return rows


def _versions(folder: RunFolder) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in folder.records.values():
        found |= record.facts.get("versions", {})
    return found
