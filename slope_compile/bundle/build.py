"""Building a bundle's engine on the device: what the bytes hold is proved first; torch and onnx_ir are not needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slope_compile import machine
from slope_compile._version import __version__
from slope_compile.artifacts import LOGS, FileDigest, read_json, storage_errors
from slope_compile.build.engine import Planned, batch_profile, compile_planned
from slope_compile.bundle import contents as names
from slope_compile.bundle.listed import read_layers, read_places
from slope_compile.bundle.opened import OpenBundle
from slope_compile.codes_file import load_codes
from slope_compile.errors import BackendError, CheckFailedError
from slope_compile.events import Events
from slope_compile.placement.apply import prove
from slope_compile.placement.choose import Place
from slope_compile.placement.situation import Situation
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.tensors import load_graph
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.backends import BACKENDS, Backend, choose_backend
from slope_compile.targets.gpu import find_gpu
from slope_compile.targets.refusals import require_buildable
from slope_compile.targets.target import find_target
from slope_compile.verify.laws.check import check_codes
from slope_compile.verify.verdict import Once


@dataclass(frozen=True)
class EngineOutcome:
    """What became of a build.

    Args:
        action: `skipped`: the engine is there already.
        reason: Why.
        layers: Its layers.json.
        engine: Where it is.
        require: What the recipe requires of it.
    """

    action: Literal["done", "skipped"]
    reason: str
    layers: Mapping[str, Any]
    engine: Path
    require: tuple[str, ...] = ()


def build_bundle(bundle: OpenBundle, events: Events, force: bool = False) -> EngineOutcome:
    """Build the engine of a bundle in its folder, `build/TARGET`, unless it is there already.

    Args:
        bundle: Whose folder's lock is held; `require_here` was asked before it was unpacked.
        events: Who is told.
        force: Build it even if nothing has changed.

    Raises:
        BackendError: If this machine is not the target, or lacks the backend or a version that the bundle expects.
        ArtifactError: If a file was edited since it was unpacked, or does not hold what it should.
        CheckFailedError: If the weights are not the trained ones.
    """
    contents, folder = bundle.contents, bundle.folder
    backend, version = _backend_here(contents)
    bundle.require_whole()
    stage = stage_of(contents)
    key = {
        "bundle": bundle.identity,
        "backend": f"{backend.name} {version}",
        "gpu": str(find_gpu()),
        "code": __version__,
    }
    engine, require = folder.stage_path(stage) / "model.engine", tuple(contents.build.require)
    reason = "forced" if force else folder.why_stale(stage, key)
    if reason is None:
        events.emit("stage_skipped", stage=stage, reason="unchanged")
        return EngineOutcome("skipped", "unchanged", read_json(engine.with_name("layers.json")), engine, require)
    events.emit("stage_start", stage=stage, reason=reason)
    started = time.monotonic()
    machine.restart_peak_memory()
    planned, layers = proved_plan(bundle), read_layers(bundle.files / names.LAYERS)
    partial = folder.fresh_partial(stage)
    with storage_errors(partial):
        built = compile_planned(planned, contents.build, partial, events, layers, folder.stage_path(stage))
    facts = machine.facts(started)
    folder.commit(stage, key, facts, LOGS)
    events.emit("stage_end", stage=stage, wall_s=facts["wall_s"])
    return EngineOutcome("done", reason, built, engine, require)


def stage_of(contents: names.Contents) -> str:
    """Return the stage that builds a bundle's engine."""
    return f"build/{contents.target}"


def proved_plan(bundle: OpenBundle) -> Planned:
    """Return what to compile, once the placed file's weights are proved to be the trained ones.

    Raises:
        ArtifactError: If a file cannot be read.
        CheckFailedError: If the model's codes are not codes.safetensors', or placed.onnx holds other weights.
    """
    contents, files = bundle.contents, bundle.files
    weights, places = coded_weights(files / names.MODEL), read_places(files / names.PLACEMENT)
    codes = load_codes(files / names.CODES)
    found = check_codes(Once(lambda: weights), Once(lambda: codes), None)
    if found.status != "pass":
        raise CheckFailedError(f"{names.MODEL} of the bundle does not hold the trained codes: {found.detail}")
    prove_placed(files / names.PLACED, weights, places)
    target, backend = find_target(contents.target), BACKENDS[contents.backend]
    batch = contents.build.batch.resolved(target.opt_batch)
    situation = Situation(
        target,
        backend,
        contents.planned_for,
        contents.precision,
        batch[1],
        contents.build.placement,
        contents.precision_reason,
    )
    profile = batch_profile(load_graph(files / names.MODEL).graph, batch)
    digest = FileDigest.of(files / names.MODEL).sha256
    return Planned(files / names.PLACED, weights, places, situation, profile, digest)


def prove_placed(placed: Path, weights: Sequence[CodedWeight], places: Sequence[Place]) -> None:
    """Raise unless every weight is in placed.onnx where placement.json says, its values bit for bit.

    Raises:
        CheckFailedError: Naming the first that is not.
    """
    if len(weights) != len(places):
        raise CheckFailedError(f"{names.PLACEMENT} places {len(places)} weights, and the model has {len(weights)}.")
    try:
        prove(placed, weights, places)
    except BackendError as error:
        raise CheckFailedError(
            f"{names.PLACED} of the bundle is not what {names.PLACEMENT} says: {error.problem}"
        ) from None


def require_here(contents: names.Contents) -> None:
    """Raise unless this machine is one that the bundle was made for; asked before anything is unpacked.

    The machine first: who is on the wrong one need not install anything. What the installed version cannot do, though
    the bundle allows it, `compile_planned` says.

    Raises:
        BackendError: If it is another GPU, or lacks the backend or a version that the bundle expects.
    """
    target, backend = find_target(contents.target), BACKENDS[contents.backend]
    require_buildable(contents.build, target, backend, contents.planned_for, find_gpu())
    _backend_here(contents)


def _backend_here(contents: names.Contents) -> tuple[Backend, str]:
    """Return the bundle's backend and the installed version of it.

    Raises:
        BackendError: If it is not installed, or in another version than the bundle expects.
    """
    backend = choose_backend(contents.backend, find_gpu())
    version = backend.installed_version()
    if not contents.accepts(version):
        raise BackendError(
            f"The bundle is for {backend.title} {contents.version_range}; {version} is installed here.",
            f"Install one of these, or make the bundle for this one: `slope-compile bundle … --tensorrt {version}`.",
        )
    return backend, version
