"""What a run folder holds, in numbers: stages, layers, sizes, metrics. For `inspect`, `run` and the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_compile.artifacts import FILES, FileDigest, RunFolder, write_atomically
from slope_compile.committed import committed_json
from slope_compile.errors import ArtifactError
from slope_compile.metric_names import compared
from slope_compile.recipe import load_recipe

if TYPE_CHECKING:
    from slope_compile.pack.sizes import Sizes

FLOAT_BYTES = 4


def summarize(folder: RunFolder) -> dict[str, Any]:
    """Return stages, per-layer rows, sizes and metrics of a run; what is not there, or damaged, is null.

    `engines` holds, for each target that was built, the line that counts what its engine holds.
    `accuracies` holds the primary metric, whose name is `metric`: accuracy, or a detector's `mask_map` or `box_map`;
    `other_metrics` likewise what else the run is judged by. `intervals` holds for each of these the 95 % intervals of
    the ONNX file's figure (`onnx`) and of its relative drop from FP32 (`drop`), and `certain`: whether other images
    would give the same verdict.
    """
    metrics, layers = _json(folder, "train/metrics.json"), _json(folder, "export/layers.json")
    metric, packed = metrics["metric"] if metrics else "accuracy", _packed(folder)
    return {
        "run": str(folder.path),
        "stages": {stage: record.to_json() for stage, record in sorted(folder.records.items())},
        "layers": _layer_rows(folder, metrics, layers, packed),
        "engines": {target: built["summary"].get("line") for target, built in _builds(folder).items()},
        "sizes": _sizes(folder, metrics, layers, packed),
        "metric": metric,
        "accuracies": _measured(folder, metrics, metric),
        "other_metrics": {name: _measured(folder, metrics, name) for name in compared(metric)[1:]},
        "intervals": {name: _intervals(folder, name) for name in compared(metric)},
    }


def verdict_of(folder: RunFolder, targets: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the verdict over the verified targets (or those given) in verify.json's form, each row with its target."""
    chosen = list(dict.fromkeys(targets) if targets else _targets(folder, "verify"))
    verdicts = {target: _json(folder, f"verify/{target}/verify.json") for target in chosen}
    present = {target: verdict for target, verdict in verdicts.items() if verdict}
    checks = [{**check, "target": target} for target, verdict in present.items() for check in verdict["checks"]]
    required = [{**row, "target": t} for t, verdict in present.items() for row in verdict.get("required", [])]
    if not present:
        return {"verdict": "not checked", "checks": [], "required": []}
    failed = len(present) < len(chosen) or any(verdict["verdict"] != "pass" for verdict in present.values())
    return {"verdict": "fail" if failed else "pass", "checks": checks, "required": required}


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
            verdicts=_verified(folder, "verify.json"),
            layer_errors=_verified(folder, "layers.json"),
            packed={f"{row['name']}.weight": row["packed"] for row in summary["layers"] if row["packed"] is not None},
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


def _verified(folder: RunFolder, file: str) -> dict[str, Any]:
    """Return that file of every target that was verified and has it."""
    return {t: found for t in _targets(folder, "verify") if (found := _json(folder, f"verify/{t}/{file}"))}


def _json(folder: RunFolder, name: str) -> Any:
    """Return a finished stage's JSON file; None where there is none, or where it is not the one that was committed.

    A damaged file is not parsed: saying so is the business of the `digest` check and of the next stage.

    Raises:
        ArtifactError: If it was committed and yet is not what its stage writes.
    """
    record = folder.records.get(name.rpartition("/")[0])
    path = folder.path / name
    if record is None or not path.is_file() or FileDigest.of(path) != record.outputs.get(name):
        return None
    return committed_json(path, name)


def _layer_rows(folder: RunFolder, metrics: Any, layers: Any, packed: Sizes | None) -> list[dict[str, Any]]:
    """Join what the policy planned, training measured, export placed and the engines hold: one row a layer."""
    if metrics is None:
        return []
    in_file = {row.name: row.packed for row in packed.tensors} if packed else {}
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
                "packed": in_file.get(weight),
                "engine": {target: found.get(weight, {}).get("engine") for target, found in built.items()},
                "placed": {target: _placed(found[weight]) for target, found in built.items() if weight in found},
            }
        )
    return rows


def _placed(row: Any) -> dict[str, Any]:
    return {"placement": row["placement"], "reason": row["reason"]}


def _sizes(folder: RunFolder, metrics: Any, layers: Any, packed: Sizes | None) -> dict[str, Any]:
    """Return bytes and ratios to FP32 of the coded weights and of the whole model.

    `nominal` counts bits × kept positions (n of m), without position metadata or scales; `packed` is what
    model.slope takes, null where there is none; `file` is what the ONNX file takes.
    """
    record = folder.records.get("export")
    if record is None or metrics is None or layers is None:
        return {}
    coded = [row for row in layers["layers"] if row["bits"] is not None]
    fp32_weights = sum(row["bytes"]["fp32"] for row in coded)
    nominal = sum(_nominal_bytes(row, row["bits"]) for row in coded)
    fp32_model = metrics["fp32_bytes"]
    rest = fp32_model - fp32_weights
    file_bytes = sum(d.size for path, d in record.outputs.items() if path.startswith("export/model.onnx"))

    def row(weights: int, model: int) -> dict[str, Any]:
        return {
            "weights": weights,
            "model": model,
            "weights_ratio": round(fp32_weights / weights, 3) if weights else None,
            "model_ratio": round(fp32_model / model, 3) if model else None,
        }

    return {
        "fp32": row(fp32_weights, fp32_model),
        "nominal": row(nominal, nominal + rest),
        "packed": None if packed is None else row(packed.weights, packed.model),
        "file": row(sum(r["bytes"]["file"] for r in coded), file_bytes),
    }


def _packed(folder: RunFolder) -> Sizes | None:
    """Return what the bytes of the packed file go to; None where there is none, or not the one that was committed."""
    record, path = folder.records.get("pack"), folder.stage_path("pack")
    if record is None or not path.is_file() or FileDigest.of(path) != record.outputs.get(path.name):
        return None
    from slope_compile.pack.read import open_packed

    try:
        return open_packed(path).sizes
    except ArtifactError:  # saying so is the business of the `packed` check
        return None


def _nominal_bytes(row: Any, bits: int) -> int:
    """Return the bytes of a layer's kept weights at so many bits."""
    n, m = (int(part) for part in row["pattern"].split(":")) if row["pattern"] else (1, 1)
    elements = row["bytes"]["fp32"] // FLOAT_BYTES
    return int(-(-elements * n * bits // (8 * m)))  # a broken byte is a byte


def _measured(folder: RunFolder, metrics: Any, metric: str) -> dict[str, float | None]:
    """Return a metric of the FP32 model, the compressed model and the ONNX file."""
    onnx = None
    for figures in _metric_figures(folder, metric):
        onnx = figures.get("onnx", onnx)
    return {
        "fp32": metrics and (metrics["fp32"] or {}).get(metric),
        "compressed": metrics and (metrics["compressed"] or {}).get(metric),
        "onnx": onnx,
    }


def _intervals(folder: RunFolder, metric: str) -> dict[str, Any]:
    """Return how sure a metric of the ONNX file is; null where it is not known."""
    found: dict[str, Any] = {}
    for figures in _metric_figures(folder, metric):
        found = figures or found
    return {"onnx": found.get("accuracy_interval"), "drop": found.get("interval"), "certain": found.get("certain")}


def _metric_figures(folder: RunFolder, metric: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of each target's check of a metric."""
    for verdict in _verified(folder, "verify.json").values():
        checks = (check for check in verdict["checks"] if check["name"] == "metric")
        figures: dict[str, Any] = next(checks, {"figures": {}})["figures"]
        yield figures.get(metric, figures)  # the primary metric's stand outside, others' below theirs


def _size_rows(folder: RunFolder, sizes: dict[str, Any]) -> list[tuple[str, str, int, bool]]:
    """Return stage, what was weighed, bytes, and whether it is a step on the way to what is deployed."""
    rows: list[tuple[str, str, int, bool]] = []
    if sizes:
        fp32 = sizes["fp32"]["model"]
        coded = [row for row in _json(folder, "export/layers.json")["layers"] if row["bits"] is not None]
        pruned = sum(row["bytes"]["fp32"] - _nominal_bytes(row, 8 * FLOAT_BYTES) for row in coded)
        rows.append(("train", "FP32 model", fp32, True))
        if pruned:
            rows.append(("train", "counted: 32 bits x kept weights", fp32 - pruned, True))
        rows.append(("train", "nominal: bits x kept weights", sizes["nominal"]["model"], True))
    for stage, file, what in (
        ("train", "train/codes.safetensors", "codes, one byte each"),
        ("pack", FILES["pack"], "Packed file"),
        ("export", "export/model.onnx", "ONNX file"),
    ):
        if record := folder.records.get(stage):
            found = sum(digest.size for path, digest in record.outputs.items() if path.startswith(file))
            rows.append((stage, what, found, stage != "train"))
    for target in _targets(folder, "build"):
        outputs = folder.records[f"build/{target}"].outputs
        rows.append((f"build/{target}", "TensorRT engine", outputs[f"build/{target}/model.engine"].size, True))
    return rows


def _versions(folder: RunFolder) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in folder.records.values():
        found |= record.facts.get("versions", {})
    return found
