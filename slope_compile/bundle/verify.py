"""Verifying a bundle and its engine on the device: what needs torch or the data set is `not checked`."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from slope_compile import machine
from slope_compile.bundle import contents as names
from slope_compile.bundle.build import prove_placed, stage_of
from slope_compile.bundle.listed import read_places
from slope_compile.bundle.opened import STAGE, OpenBundle
from slope_compile.errors import CheckFailedError
from slope_compile.events import Events
from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.asked import Asked
from slope_compile.verify.built.check import check_engine_layers
from slope_compile.verify.files import write_verdict
from slope_compile.verify.laws.digests import digests_of
from slope_compile.verify.metric.check import MetricTask
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.engine import EngineUnderTest, engine_under_test
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, Verdict, attempt

if TYPE_CHECKING:
    from torch import nn

PLACEMENT = "placement"


def verify_bundle(
    bundle: OpenBundle, events: Events, required: tuple[str, ...] = (), trust_engine: bool = False
) -> Verdict:
    """Run every check that needs neither torch nor data; writes `verify/TARGET/verify.json` and `junit.xml`.

    Files that are not what the manifest says fail the `digest` check, and are examined all the same.

    Args:
        bundle: Whose folder's lock is held.
        events: Who is told.
        required: Checks that must pass.
        trust_engine: Load the engine although the manifest has not its sha256.

    Raises:
        StorageError: If the verdict cannot be written.
    """
    contents, files, folder = bundle.contents, bundle.files, bundle.folder
    stage = f"verify/{contents.target}"
    events.emit("stage_start", stage=stage, reason="asked for")
    started = time.monotonic()
    machine.restart_peak_memory()
    digests, partial = digests_of(folder, (STAGE, stage_of(contents))), folder.fresh_partial(stage)
    engine = _engine(bundle, trust_engine)
    verdict = verify_model(
        files / names.MODEL,
        codes=files / names.CODES,
        model=_no_model,
        golden=files / names.GOLDEN,
        engine=engine,
        engine_layers=lambda: _check_layers(bundle, engine),
        layers=files / names.LAYERS,
        packed=_no_packed_file,
        metric=_no_data,
        digests=digests,
        placed=files / names.PLACED,
        allowed=bundle_tolerance(contents),
        out=partial,
        events=events,
    )
    check = attempt(PLACEMENT, lambda: _check_placement(files))
    events.emit("check", name=check.name, status=check.status, detail=check.detail)
    verdict = Verdict((*verdict.checks, check), required)
    write_verdict(partial, verdict)
    facts = machine.facts(started)
    folder.commit(stage, {"bundle": bundle.identity, **Asked(trust_engine=trust_engine).key()}, facts)
    events.emit("stage_end", stage=stage, wall_s=facts["wall_s"])
    return verdict


def _check_placement(files: Path) -> Check:
    """`placement`: placed.onnx holds the model's weights, bit for bit, where placement.json puts them."""
    weights, places = coded_weights(files / names.MODEL), read_places(files / names.PLACEMENT)
    try:
        prove_placed(files / names.PLACED, weights, places)
    except CheckFailedError as error:
        return Check(PLACEMENT, "fail", str(error))
    counts = Counter(place.placement for place in places)
    told = ", ".join(f"{count} {placement}" for placement, count in sorted(counts.items()))
    detail = f"{len(places)} weights of {names.PLACED} are the model's where they were placed: {told}"
    return Check(PLACEMENT, "pass", detail, {"weights": len(places), "placements": dict(sorted(counts.items()))})


def _check_layers(bundle: OpenBundle, engine: EngineUnderTest | None) -> Check:
    """`engine.layers`: the engine holds what the bundle placed, and what is written of it is so."""
    files = bundle.files
    if engine is None or not engine.layers.is_file():
        raise NotCheckedError("no engine was built here")
    weights = [weight.name for weight in coded_weights(files / names.MODEL)]
    expected = dict(zip(weights, read_places(files / names.PLACEMENT), strict=True))
    return check_engine_layers(engine, files / names.MODEL, files / names.PLACED, bundle.contents.target, expected)


def bundle_tolerance(contents: names.Contents) -> Tolerance:
    """Return how far the engine's outputs may be off: infinitely where the bundle says that nothing is told."""
    if contents.allowed is None:
        return Tolerance(math.inf, "rounding alone moves the outputs anywhere")
    return Tolerance(contents.allowed.relative, contents.allowed.derivation)


def _engine(bundle: OpenBundle, trust: bool) -> EngineUnderTest | None:
    folder, stage = bundle.folder, stage_of(bundle.contents)
    if stage not in folder.records:
        return None
    name = f"{stage}/model.engine"
    listed = folder.records[stage].outputs.get(name)
    return engine_under_test(folder.path / name, folder.stage_path(stage) / "layers.json", listed, trust)


def _no_model() -> nn.Module:
    raise NotCheckedError("a bundle brings no torch model")


def _no_packed_file() -> Check:
    raise NotCheckedError("a bundle does not carry the packed file")


def _no_data() -> MetricTask:
    raise NotCheckedError("a bundle brings no validation data")
