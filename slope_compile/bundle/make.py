"""From a run to a bundle: the model is placed here, where onnx_ir is; the device only compiles it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from slope_compile._version import __version__
from slope_compile.artifacts import FileDigest, RunFolder, read_json, storage_errors
from slope_compile.build.engine import Planned, plan_build
from slope_compile.bundle import contents as names
from slope_compile.bundle.contents import Allowed, Contents, Entry
from slope_compile.bundle.pack import write_bundle
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.events import Events
from slope_compile.placement.situation import situation_of
from slope_compile.recipe import BatchRange, BuildSection, Recipe
from slope_compile.targets.backends import BACKENDS, Backend
from slope_compile.targets.refusals import require_possible
from slope_compile.targets.target import Target, TensorRTRange, find_target
from slope_compile.targets.versions import parse_version
from slope_compile.verify.chain.golden import read_golden
from slope_compile.verify.parity.allowed import of_engine
from slope_compile.verify.parity.outputs import named
from slope_compile.verify.verdict import NotCheckedError

SUFFIX = ".bundle.zip"


def bundle_run(
    folder: RunFolder,
    recipe: Recipe,
    target: str,
    events: Events,
    out: Path | None = None,
    version: str | None = None,
) -> tuple[Path, Contents]:
    """Write the bundle of a run for a target.

    Args:
        folder: The run: trained and exported.
        recipe: Its recipe; `build` says how the device is to build.
        target: Name of the target.
        events: Who is told.
        out: The archive; default: RUN.TARGET.bundle.zip beside the run folder.
        version: TensorRT's version on the device; default: the first that runs on the target.

    Returns:
        The archive, and what it holds.

    Raises:
        ArtifactError: If the run is not exported, or was edited.
        BackendError: If no backend can build for the target as the recipe asks, or ONNX Runtime is needed here.
        StorageError: If the archive cannot be written.
    """
    path, aim = _archive_path(folder, target, out), find_target(target)
    for stage in ("train", "export"):
        folder.require(stage)
    section = _on_device(recipe.build, aim)
    backend, planned_for = _builder(section, aim, version)
    model = folder.stage_path("export") / names.MODEL
    events.emit("stage_start", stage=f"bundle/{target}", reason="asked for")
    started = time.monotonic()
    with storage_errors(path), tempfile.TemporaryDirectory(prefix="slope-compile.") as work:
        here, situation = Path(work), situation_of(section, aim, backend, planned_for, model)
        planned = plan_build(model, situation, section, here, events)
        (here / names.PLACEMENT).write_text(placement_json(planned), encoding="utf-8")
        (here / names.RECIPE).write_text(recipe.model_copy(update={"build": section}).to_yaml(), encoding="utf-8")
        files = _files(folder, here)
        contents = _contents(folder, section, planned, files)
        write_bundle(path, contents, files)
    events.emit("stage_end", stage=f"bundle/{target}", wall_s=round(time.monotonic() - started, 2))
    return path, contents


def _archive_path(folder: RunFolder, target: str, out: Path | None) -> Path:
    run = folder.path.resolve()
    path = out or run.with_name(f"{run.name}.{target}{SUFFIX}")
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder.", "Name the archive to write with --out.")
    return path


def _builder(section: BuildSection, target: Target, version: str | None) -> tuple[Backend, str]:
    """Return who builds on the device, and for which version of it the model is placed.

    Raises:
        BackendError: If the version is none, or nobody can build for the target as the recipe asks.
    """
    backend = BACKENDS["tensorrt" if section.backend == "auto" else section.backend]
    planned_for = _first_version(target, backend) if version is None else version
    if not names.VERSION.fullmatch(planned_for):
        raise BackendError(f"'{planned_for[:50]}' is no version.", "Example: --tensorrt 10.3")
    require_possible(section, target, backend, planned_for)
    return backend, planned_for


def _files(folder: RunFolder, placed: Path) -> dict[str, Path]:
    """Return where each file of the archive lies: what was placed just now, and what training and export left."""
    files = {file.name: file for file in placed.iterdir()}
    export = folder.stage_path("export")
    exported = (names.MODEL, f"{names.MODEL}.data", names.GOLDEN, names.LAYERS)
    files |= {file: export / file for file in exported if (export / file).exists()}
    return files | {names.CODES: folder.stage_path("train") / names.CODES}


def _contents(folder: RunFolder, section: BuildSection, planned: Planned, files: Mapping[str, Path]) -> Contents:
    """Return what bundle.json says.

    Raises:
        ArtifactError: If something of the run cannot be told there.
        BackendError: If the tolerance cannot be measured here.
    """
    situation = planned.situation
    try:
        return Contents(
            format=names.FORMAT,
            kind=names.KIND,
            made_by=__version__,
            name=folder.path.resolve().name,
            target=situation.target.name,
            backend="tensorrt" if situation.backend.needs_gpu else "tensorrt-rtx",
            planned_for=situation.version,
            versions=_versions(situation.target, situation.backend, situation.version),
            build=section,
            precision=situation.precision,
            precision_reason=situation.precision_reason,
            allowed=_allowed(files[names.MODEL], files[names.GOLDEN], planned),
            files={file: _entry(source) for file, source in files.items()},
            **_accuracies(folder.stage_path("train")),
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ArtifactError(
            f"{folder.path} cannot be bundled: {where} would be {str(first['input'])[:100]!r}: {first['msg']}.",
            "Mend that in the run, or make it anew with `slope-compile train`.",
        ) from None


def _on_device(section: BuildSection, target: Target) -> BuildSection:
    """Return how the device builds: for itself, with the batch sizes of here, without a timing cache of elsewhere."""
    low, opt, high = section.batch.resolved(target.opt_batch)
    batch = BatchRange(min=low, opt=opt, max=high)
    return section.model_copy(update={"targets": [target.name], "batch": batch, "timing_cache": None})


def placement_json(planned: Planned) -> str:
    """Return placement.json: what becomes of each weight, in the model's order."""
    return json.dumps({"places": [asdict(place) for place in planned.places]}, indent=1, allow_nan=False) + "\n"


def _first_version(target: Target, backend: Backend) -> str:
    if backend.needs_gpu:
        return target.tensorrt[0].first
    try:
        return backend.installed_version()
    except BackendError:
        raise BackendError(
            f"{backend.title} is not installed, so its version on the device is not known.", "Name it with --tensorrt."
        ) from None


def _versions(target: Target, backend: Backend, planned_for: str) -> tuple[TensorRTRange, ...]:
    """Return which versions may build: those from `planned_for` on that run on the target."""
    first = parse_version(planned_for)
    if not backend.needs_gpu:
        return (TensorRTRange(system=backend.title, first=planned_for, below=str(first[0] + 1)),)
    rows = [row for row in target.tensorrt if parse_version(row.below) > first]
    return tuple(r if parse_version(r.first) >= first else r.model_copy(update={"first": planned_for}) for r in rows)


def _allowed(model: Path, golden: Path, planned: Planned) -> Allowed | None:
    """Return how far the engine's outputs may be off; None where rounding alone moves them anywhere.

    Raises:
        BackendError: If that must be measured, and ONNX Runtime is not installed.
    """
    from slope_compile.qdq.activations import stored_quantizers

    inputs = named(read_golden(golden), model).inputs
    try:
        found = of_engine(model, planned.weights, stored_quantizers(model), [inputs], planned.placed)
    except NotCheckedError as error:
        raise BackendError(
            f"How far rounding moves quantized activations is measured with ONNX Runtime: {error}.",
            "Install it where the bundle is made: pip install onnxruntime.",
        ) from None
    if not math.isfinite(found.relative):
        return None
    return Allowed(relative=found.relative, derivation=found.derivation)


def _accuracies(train: Path) -> dict[str, Any]:
    """Return the primary metric's name and figures, as training measured them."""
    try:
        metrics = read_json(train / "metrics.json")
        metric = str(metrics["metric"])
        figures = {which: metrics[which] and float(metrics[which][metric]) for which in ("fp32", "compressed")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{train / 'metrics.json'} cannot be read: {error}.", "Make it anew with `slope-compile train`."
        ) from None
    return {"metric": metric, "accuracies": figures}


def _entry(path: Path) -> Entry:
    found = FileDigest.of(path)
    return Entry(size=found.size, sha256=found.sha256)
