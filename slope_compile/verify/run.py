"""Verification of a run folder for one target, and of an ONNX file with a model from Python."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope_compile.artifacts import Record, RunFolder, read_json
from slope_compile.errors import ArtifactError, DataError, ModelError
from slope_compile.events import Events
from slope_compile.metric_names import compared, words
from slope_compile.recipe import Recipe
from slope_compile.train.validation import FILE as RECORD
from slope_compile.train.validation import Answers, load_record
from slope_compile.verify.asked import Asked
from slope_compile.verify.baseline.check import check_baseline
from slope_compile.verify.baseline.runs import Compared
from slope_compile.verify.built.check import check_engine_layers
from slope_compile.verify.files import write_verdict
from slope_compile.verify.laws.digests import digests_of
from slope_compile.verify.laws.packed import check_packed
from slope_compile.verify.metric.check import NO_RECORD, Batch, MetricTask, References
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.engine import EngineUnderTest, engine_under_test
from slope_compile.verify.require import parse_required
from slope_compile.verify.verdict import Check, NotCheckedError, Verdict

if TYPE_CHECKING:
    from torch import nn


def verify_run(
    recipe: Recipe, folder: RunFolder, target: str, out: Path, events: Events, asked: Asked | None = None
) -> Verdict:
    """Verify what a run exported and built for a target; writes `verify.json` and `junit.xml`.

    Files that are not what the manifest says fail the `digest` check, and are examined all the same.

    Args:
        recipe: The run's recipe.
        folder: The run.
        target: For which target the engine was built.
        out: Where to write.
        events: Who is told.
        asked: A baseline to compare with, and whether an engine that no manifest knows may be loaded.

    Raises:
        ArtifactError: If nothing was trained or exported.
        RecipeError: If the recipe requires a check that there is not.
        StorageError: If the verdict cannot be written.
    """
    asked, required = asked or Asked(), parse_required(recipe.verify.require)
    for stage in ("train", "export"):
        if stage not in folder.records:
            raise ArtifactError(f"{folder.path} has no finished '{stage}'.", f"Run `slope-compile {stage}` first.")
    train, export = folder.stage_path("train"), folder.stage_path("export")
    built = f"build/{target}"
    digests = digests_of(folder, ("train", "pack", "export", built))
    packed = folder.stage_path("pack")
    engine = _engine(folder, target, asked.trust_engine)
    placed = folder.stage_path(built) / "placed.onnx" if built in folder.records else None
    verdict = verify_model(
        export / "model.onnx",
        codes=train / "codes.safetensors",
        model=lambda: _trained(recipe, train),
        golden=export / "golden.safetensors",
        engine=engine,
        engine_layers=lambda: check_engine_layers(engine, export / "model.onnx", placed, target),
        layers=export / "layers.json",
        packed=(lambda: check_packed(packed, train)) if "pack" in folder.records else None,
        placed=placed,
        metric=lambda: _metric(recipe, train / "metrics.json", folder.records["train"]),
        digests=digests,
        out=out,
        events=events,
    )
    verdict = Verdict((*verdict.checks, *_baseline(recipe, folder, target, asked, verdict, events)), required)
    write_verdict(out, verdict)
    return verdict


def _baseline(
    recipe: Recipe, folder: RunFolder, target: str, asked: Asked, verdict: Verdict, events: Events
) -> list[Check]:
    """Return the checks against the baseline; none where there is no baseline."""
    if asked.baseline is None:
        return []
    made = {check.name: check for check in verdict.checks}
    checks = check_baseline(Compared(folder, asked.baseline, target, recipe.verify.baseline, made))
    for check in checks:
        events.emit("check", name=check.name, status=check.status, detail=check.detail)
    return checks


def verify(onnx: Path | str, *, model: nn.Module | None = None, golden: Path | str | None = None) -> Verdict:
    """Verify an ONNX file against the torch model it was exported from.

    Args:
        onnx: The file.
        model: The model with its parametrizations; its coded weights must be in the file, bit for bit.
        golden: Golden inputs and outputs; by default those that export put beside the file (`m.golden.safetensors`).
            Where there are none, parity runs on random inputs of the file's own input shape.

    Returns:
        The verdict; checks for which nothing was given are `not checked`.
    """
    path = Path(onnx)
    codes = None
    if model is not None:
        from slope_compile.compression.api import codes as codes_of

        codes = codes_of(model)
    beside = path.with_suffix(".golden.safetensors")
    kept = Path(golden) if golden is not None else beside if beside.is_file() else None
    layers = path.with_suffix(".layers.json")
    return verify_model(path, codes=codes, model=model, golden=kept, layers=layers if layers.is_file() else None)


def _engine(folder: RunFolder, target: str, trust: bool) -> EngineUnderTest | None:
    stage = f"build/{target}"
    if stage not in folder.records:
        return None
    name = f"{stage}/model.engine"
    listed = folder.records[stage].outputs.get(name)
    return engine_under_test(folder.path / name, folder.stage_path(stage) / "layers.json", listed, trust)


def _trained(recipe: Recipe, train: Path) -> nn.Module:
    _require_torch()
    from slope_compile.train.trained import load_trained

    try:
        return load_trained(recipe, train)
    except ModelError as error:  # the user's own file, looked for from another folder, say: no fault of the artifact
        raise NotCheckedError(str(error)) from None


def _metric(recipe: Recipe, metrics: Path, trained: Record) -> MetricTask:
    _require_torch()
    from slope_compile.train.sources import source_digests

    try:
        now = source_digests(recipe)
    except (DataError, ModelError) as error:
        raise NotCheckedError(str(error)) from None
    changed = [name for name, digest in now.items() if trained.key.get(name) != digest]
    if changed:
        raise NotCheckedError(f"{', '.join(changed)} changed since training: the accuracies would be of other images")
    from slope_compile.train.data import load_data
    from slope_compile.train.loader import batches, in_order

    measured = _json(metrics)
    metric, record = _name(measured), _record(metrics.with_name(RECORD), trained)
    data = load_data(recipe.data, recipe.train.seed, recipe.model.classes)
    if data.kind == "detection":
        from slope_compile.verify.metric.detector import detection_task

        references = {
            name: References(_figure(measured, "fp32", name), _figure(measured, "compressed", name))
            for name in compared(metric)
        }
        budget = recipe.verify.metric_drop
        return detection_task(data.validation, recipe.data.batch, budget, metric, references, record)
    validation = data.validation
    order = in_order(len(validation), recipe.data.batch)

    def arrays() -> Iterator[Batch]:
        # No workers: they are forked, and by now ONNX Runtime's threads are running.
        for images, labels in batches(validation, order, workers=0, pin=False):
            yield images.numpy(), labels.numpy()

    return MetricTask(
        batches=arrays,
        items=len(validation),
        budget=recipe.verify.metric_drop,
        fp32=_figure(measured, "fp32", metric),
        compressed=_figure(measured, "compressed", metric),
        record=record,
    )


def _record(path: Path, trained: Record) -> Mapping[str, Answers] | str:
    """Return what training's models answered to each item; or that training kept no such record, as it once did not.

    Raises:
        ArtifactError: If there is or should be one, and it is not what training writes.
    """
    if not path.is_file() and not any(Path(name).name == RECORD for name in trained.outputs):
        return f"{NO_RECORD} (no {path.name})"
    return load_record(path)


def _require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise NotCheckedError("torch is not installed here (pip install 'slope-compile[train]')")


def _name(metrics: Any) -> str:
    """Return the run's primary metric."""
    try:
        return str(metrics["metric"])
    except (KeyError, TypeError):
        raise ArtifactError("metrics.json names no metric.", "Make it anew with `slope-compile train`.") from None


def _figure(metrics: Any, which: str, metric: str) -> float | None:
    try:
        value = metrics[which]
        return None if value is None else float(value[metric])
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(
            f"metrics.json holds no '{which}' {words(metric)}.", "Make it anew with `slope-compile train`."
        ) from None


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path.name} cannot be read: {error}.", "Make it anew.") from None
