"""`baseline.*`: this run against another one, the last release. Worse than the budget fails, better never does.

What both runs must have for a comparison and one of them has not is `not checked`, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from slope_compile.artifacts import FILES, RunFolder
from slope_compile.errors import RecipeError
from slope_compile.metric_names import compared as metrics_of
from slope_compile.metric_names import words
from slope_compile.recipe import Recipe, load_recipe
from slope_compile.verify.baseline.engine import check_latency, check_layers, check_sparse
from slope_compile.verify.baseline.runs import OURS, THEIRS, Compared, not_readable, read_stage
from slope_compile.verify.verdict import Check, NotCheckedError, attempt, listed, significant

PACKED = FILES["pack"]
OF_MODEL = ("baseline.size", "baseline.metric")
SAME_MODEL = "model.onnx is the baseline's, byte for byte: the same model"
# What must be the same for figures of two runs to be of the same thing.
SAME = {"model": ("name", "classes", "stem"), "data": ("source", "size", "validation", "bad_images")}


def open_baseline(path: Path, recipe: Recipe, targets: list[str]) -> RunFolder:
    """Open the run to compare with, its files proved to be those that its manifest lists.

    Args:
        path: Its folder.
        recipe: This run's.
        targets: Those that are verified.

    Raises:
        ArtifactError: If it is no run, not trained and exported, or a file of it is missing, truncated or edited.
        RecipeError: If it is of another model or other data.
    """
    folder = RunFolder.existing(path)
    for stage in ("train", "export"):
        folder.require(stage)
    for stage in ("pack", *(f"{kind}/{target}" for target in targets for kind in ("build", "verify", "bench"))):
        if stage in folder.records:
            folder.require(stage)
    theirs, ours = load_recipe(path / "recipe.yaml").model_dump(mode="json"), recipe.model_dump(mode="json")
    other = [
        f"{section}.{key} is {theirs[section][key]!r} there and {ours[section][key]!r} here"
        for section, keys in SAME.items()
        for key in keys
        if theirs[section][key] != ours[section][key]
    ]
    if other:
        raise RecipeError(
            f"--baseline {path} cannot be compared with: {'; '.join(other)}.",
            "Name a run of the same model on the same data.",
        )
    return folder


def check_baseline(compared: Compared) -> list[Check]:
    """Return the checks against the baseline, in order."""
    checks: dict[str, Callable[[Compared], Check]] = {
        "baseline.size": check_size,
        "baseline.metric": check_metric,
        "baseline.latency": check_latency,
        "baseline.sparse": check_sparse,
        "baseline.layers": check_layers,
    }
    made = [attempt(name, lambda check=check: check(compared)) for name, check in checks.items()]  # type: ignore[misc]
    model = "export/model.onnx"
    ours, theirs = (run.records["export"].outputs.get(model) for run in (compared.ours, compared.theirs))
    if ours is None or ours != theirs:
        return made
    return [
        replace(check, detail=f"{check.detail}; {SAME_MODEL}")
        if check.name in OF_MODEL and check.status == "pass"
        else check
        for check in made
    ]


def check_size(compared: Compared) -> Check:
    """`baseline.size`: bytes of the ONNX file, of the target's engine and of the packed file, where both have them."""
    pairs = {
        "model.onnx": tuple(_bytes(run, "export", "export/model.onnx") for run in (compared.ours, compared.theirs)),
        "model.engine": tuple(
            _bytes(run, compared.build, f"{compared.build}/model.engine") for run in (compared.ours, compared.theirs)
        ),
        PACKED: tuple(_bytes(run, "pack", PACKED) for run in (compared.ours, compared.theirs)),
    }
    told, worse, figures = [], [], dict[str, Any](baseline=compared.theirs.path.name, budget=compared.budgets.size)
    for name, (now, before) in pairs.items():
        if not now or not before:
            continue
        growth = now / before - 1
        figures[name] = {"bytes": now, "baseline": before, "growth": significant(growth)}
        text = f"{name} has {now} bytes, the baseline's {before} ({100 * growth:+.2f} %)"
        told.append(text)
        if growth > compared.budgets.size:
            worse.append(text)
    if not told:
        raise NotCheckedError("the two runs have no file in common")
    if worse:
        return Check("baseline.size", "fail", f"{listed(worse)}; allowed {100 * compared.budgets.size:+g} %", figures)
    return Check("baseline.size", "pass", listed(told), figures)


def _bytes(run: RunFolder, stage: str, prefix: str) -> int | None:
    """Return the bytes on disk of a stage's file, external data with it; None where there is no such stage."""
    if stage not in run.records:
        return None
    paths = [run.path / path for path in run.records[stage].outputs if path.startswith(prefix)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def check_metric(compared: Compared) -> Check:
    """`baseline.metric`: the task's metrics, of the ONNX files where both were measured, else as trained."""
    ours, theirs = compared.both("train/metrics.json")
    changed = _changed_sources(compared)
    if changed:
        raise NotCheckedError(f"{', '.join(changed)} changed since the baseline was trained: figures of other data")
    names = _metric_names(ours, theirs)
    now, before = _onnx(compared.made["metric"], names), _baseline_onnx(compared, names)
    whose = "ONNX file"
    if now is None or before is None:
        whose = "trained model"
        now, before = _trained(ours, names), _trained(theirs, names)
    budget = compared.budgets.metric_drop
    figures: dict[str, Any] = {"baseline": compared.theirs.path.name, "of": whose, "budget": budget}
    told, worse = [], False
    for name in names:
        drop = (before[name] - now[name]) / before[name] if before[name] else 0.0
        worse |= not drop <= budget  # NaN is no better
        figures[name] = {"value": now[name], "baseline": before[name], "drop": significant(drop)}
        told.append(f"{words(name)} of the {whose} {now[name]:.4f}, the baseline's {before[name]:.4f}")
    detail = f"{'; '.join(told)}; drop {'beyond' if worse else 'within'} {100 * budget:.2f}%"
    return Check("baseline.metric", "fail" if worse else "pass", detail, figures)


def _changed_sources(compared: Compared) -> list[str]:
    """Return the data sources, digested when a training began, that are not the same in both."""
    ours, theirs = (run.records["train"].key for run in (compared.ours, compared.theirs))
    told = {name for name in {*ours, *theirs} - {"recipe", "code"} if name.startswith("data")}
    return sorted(name for name in told if ours.get(name) != theirs.get(name))


def _metric_names(ours: Any, theirs: Any) -> tuple[str, ...]:
    mine, other = _judged_by(ours, OURS), _judged_by(theirs, THEIRS)
    if mine != other:
        raise NotCheckedError(f"this run is judged by {mine}, the baseline by {other}")
    return metrics_of(mine)


def _judged_by(metrics: Any, whose: str) -> str:
    try:
        return str(metrics["metric"])
    except (KeyError, TypeError):
        problem = f"metrics.json of {whose} names no metric"
        raise not_readable(whose, problem, "Make it anew with `slope-compile train`.") from None


def _trained(metrics: Any, names: tuple[str, ...]) -> dict[str, float]:
    try:
        return {name: float(metrics["compressed"][name]) for name in names}
    except (KeyError, TypeError, ValueError):
        raise NotCheckedError("the compressed model's metrics were not measured in both runs") from None


def _baseline_onnx(compared: Compared, names: tuple[str, ...]) -> dict[str, float] | None:
    """Return what the baseline's verification measured on the ONNX file that it has now; None if it did not."""
    stage = f"verify/{compared.target}"
    record = compared.theirs.records.get(stage)
    model = "export/model.onnx"
    export = compared.theirs.records["export"].outputs.get(model)
    if record is None or export is None or record.key.get(f"input {model}") != export.sha256:
        return None
    verdict = read_stage(compared.theirs, f"{stage}/verify.json", THEIRS)
    try:
        found = next((check for check in verdict["checks"] if check["name"] == "metric"), None)
        return None if found is None else _figures(found["figures"], names)
    except (KeyError, TypeError, AttributeError):
        raise NotCheckedError("verify.json of the baseline is not a verdict of this version") from None


def _onnx(check: Check, names: tuple[str, ...]) -> dict[str, float] | None:
    """Return what this verification measured; None where it could not measure.

    Raises:
        NotCheckedError: If it tried to and failed: then as trained is no answer.
    """
    if check.status == "not checked":
        return None
    if (found := _figures(check.figures, names)) is None:
        raise NotCheckedError(f"the metric of this run's ONNX file could not be measured: {check.detail}")
    return found


def _figures(figures: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, float] | None:
    """The primary metric's figures stand outside, the others' below their names."""
    found = {name: figures.get(name, figures).get("onnx") for name in names}
    known = all(isinstance(value, float | int) and math.isfinite(value) for value in found.values())
    return {name: float(value) for name, value in found.items()} if known else None
