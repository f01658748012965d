"""From an ONNX file to an engine for one target, and to what the engine really holds: a plan, and its compilation.

`plan_build` decides what becomes of each weight and writes the file that a backend gets; it works on any machine.
`compile_planned` makes the engine, and imports nothing that a device lacks (no torch, onnx_ir, onnxruntime).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from slope_compile.artifacts import FileDigest, read_json
from slope_compile.build.counts import summarize
from slope_compile.build.process import build_repeated
from slope_compile.build.rows import engine_rows
from slope_compile.build.timing import keep_cache, starting_cache
from slope_compile.build.worker import Request, Shapes
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.events import Events
from slope_compile.lint.check import lint
from slope_compile.placement.apply import placed_model
from slope_compile.placement.choose import Place, choose_places
from slope_compile.placement.rules import SPARSE
from slope_compile.placement.situation import Situation, situation_of
from slope_compile.qdq.checks import check_scale, check_zero_point
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.tensors import load_graph
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import MAX_EXTENT, BuildSection
from slope_compile.targets.backends import BACKENDS, choose_backend
from slope_compile.targets.gpu import find_gpu
from slope_compile.targets.options import Options
from slope_compile.targets.refusals import notes, require_buildable, require_gpu
from slope_compile.targets.target import find_target

VIOLATIONS_TOLD = 3


@dataclass(frozen=True)
class Planned:
    """What to compile: everything that `compile_planned` needs, on this machine or on the device.

    Args:
        placed: The ONNX file that the backend gets.
        weights: The weights of the exported model.
        places: What becomes of each of them, in the same order.
        situation: For whom they were placed.
        profile: Input -> (min, opt, max) shapes of the inputs whose batch is dynamic.
        onnx_sha256: The exported model's digest.
    """

    placed: Path
    weights: list[CodedWeight]
    places: list[Place]
    situation: Situation
    profile: Shapes
    onnx_sha256: str

    @property
    def sparse(self) -> bool:
        """Whether sparse kernels may be chosen: where a layer was placed for them."""
        return any(place.placement in SPARSE for place in self.places)


def build_run(
    section: BuildSection, target: str, export: Path, out: Path, events: Events, last: Path | None = None
) -> None:
    """Build one target of a run.

    Args:
        section: The recipe's `build`.
        target: Name of the target.
        export: The finished export stage: model.onnx and layers.json.
        out: Empty folder for model.engine, placed.onnx, layers.json, build.log and, where the backend has one,
            timing.cache and timing.json.
        events: Who is told.
        last: Folder of the last build for that target, whose timing cache is used again where it fits.

    Raises:
        BackendError: As `build_engine`.
        ArtifactError: If the export is damaged.
    """
    layers = _read_layers(export / "layers.json")
    build_engine(export / "model.onnx", target, section, out, events, layers, last)


def build_engine(
    model: Path,
    target: str,
    section: BuildSection,
    out: Path,
    events: Events,
    layers: Mapping[str, Any] | None = None,
    last: Path | None = None,
) -> dict[str, Any]:
    """Build an engine and read back what it holds.

    Args:
        model: An ONNX file; only the batch axis may be dynamic.
        target: Name of the target.
        section: How to build; `section.targets` is not read.
        out: Folder for model.engine, placed.onnx, layers.json, build.log and, where the backend has one, timing.cache
            and timing.json.
        events: Who is told.
        layers: The export's layers.json, where the model comes from our export.
        last: Folder of the last build for that target, whose timing cache is used again where it fits.

    Returns:
        What layers.json holds: `header` (for `check_engine`), `summary`, `layers`.

    Raises:
        BackendError: If there is no such target or backend, the backend cannot build for the target here, or it fails.
        ArtifactError: If the model or a timing cache cannot be read.
    """
    aim, gpu = find_target(target), find_gpu()
    if section.backend in BACKENDS:  # what an installation would not cure comes first
        require_gpu(aim, BACKENDS[section.backend], gpu)
    backend = choose_backend(section.backend, gpu)
    version = backend.installed_version()
    require_buildable(section, aim, backend, version, gpu)
    situation = situation_of(section, aim, backend, version, model)
    planned = plan_build(model, situation, section, out, events)
    return compile_planned(planned, section, out, events, layers, last)


def plan_build(model: Path, situation: Situation, section: BuildSection, out: Path, events: Events) -> Planned:
    """Decide what becomes of each weight, and write the file that the backend gets; needs no GPU and no backend.

    Args:
        model: An ONNX file; only the batch axis may be dynamic.
        situation: For whom.
        section: How to build.
        out: Folder for placed.onnx.
        events: Who is told.

    Raises:
        BackendError: If the target cannot take what the recipe asks for.
        ArtifactError: If the model cannot be read, or breaks a rule of the lint in a way that is not mended here.
    """
    events.progress("build", 0, 3, "placing weights")
    precision = f"activations that are not quantized are {situation.precision}"
    events.note("build", f"{precision}: {situation.precision_reason}")
    weights = coded_weights(model)
    if findings := [str(found) for weight in weights for found in (*check_scale(weight), *check_zero_point(weight))]:
        raise ArtifactError(
            f"{model}: {'; '.join(findings[:3])}.",
            "TensorRT wants positive scales and zero points of 0: quantize it so.",
        )
    refuse_violations(model, situation)
    profile = batch_profile(load_graph(model).graph, section.batch.resolved(situation.target.opt_batch))
    places = choose_places(model, weights, situation)
    placed = placed_model(model, weights, places, situation, out)
    return Planned(placed, weights, places, situation, profile, FileDigest.of(model).sha256)


def refuse_violations(model: Path, situation: Situation) -> None:
    """Raise if a file breaks a lint rule in a way that `build` does not mend.

    The backend would refuse it too, or worse: take it, and compute something else (UINT8 read as INT8).

    Raises:
        ArtifactError: Naming the first rules that are broken.
    """
    errors = [found for found in lint(model, situation) if found.level == "error"]
    if errors:
        told = "; ".join(f"{found.rule}: {found.where}: {found.detail}" for found in errors[:VIOLATIONS_TOLD])
        more = f" ({len(errors) - VIOLATIONS_TOLD} more)" if len(errors) > VIOLATIONS_TOLD else ""
        raise ArtifactError(
            f"{model}: {told}{more}.",
            f"{errors[0].remedy} `slope-compile inspect {model} --target {situation.target.name}` lists all findings.",
        )


def compile_planned(
    planned: Planned,
    section: BuildSection,
    out: Path,
    events: Events,
    layers: Mapping[str, Any] | None = None,
    last: Path | None = None,
) -> dict[str, Any]:
    """Build the engine of a plan, and read back what it holds; no torch, onnx_ir or onnxruntime is imported.

    Args:
        planned: What to compile.
        section: How to build.
        out: Folder for model.engine, layers.json, build.log and, where the backend has one, timing.cache and
            timing.json.
        events: Who is told.
        layers: The export's layers.json, where the model comes from our export.
        last: Folder of the last build for that target, whose timing cache is used again where it fits.

    Returns:
        What layers.json holds: `header` (for `check_engine`), `summary`, `layers`.

    Raises:
        BackendError: If the backend cannot build for the target here, refuses the timing cache, or fails.
        ArtifactError: If the model or a timing cache cannot be read.
    """
    target, backend, gpu = planned.situation.target, planned.situation.backend, find_gpu()
    installed = backend.installed_version()
    require_buildable(section, target, backend, installed, gpu)
    stored = {weight.dtype for weight in planned.weights}
    remarks = notes(section, target, backend, installed, planned.sparse, stored)
    for remark in remarks:
        events.note("build", remark)
    events.progress("build", 1, 3, f"{backend.title} for {target.name}")
    options = Options.of(section)
    request = Request(backend.name, planned.placed.name, target.sm, planned.profile, planned.sparse, options)
    cache = starting_cache(section.timing_cache, last, backend, installed, gpu, events)
    built = build_repeated(request, backend, planned.placed.parent, out / "build.log", cache)
    events.progress("build", 2, 3, "reading the engine's layer list")
    (out / "model.engine").write_bytes(built.engine)
    keep_cache(built.cache, out, backend, built.version, gpu)
    log = (out / "build.log").read_text(encoding="utf-8", errors="replace")
    graph = load_graph(planned.placed).graph
    rows = engine_rows(planned.weights, planned.places, graph, log, backend, layers, built.inspector)
    for row in rows:
        if row["placement"] != "float" and not row["engine"]["held"]:
            events.warning("build", f"{row['name']}: {row['engine']['note']}")
    header = _header(planned, options, built.version, out / "model.engine") | {"notes": remarks}
    result = {"header": header, "summary": summarize(rows, log, backend, built.inspector), "layers": rows}
    (out / "layers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    events.progress("build", 3, 3, f"{len(built.engine)} bytes")
    return result


def batch_profile(graph: onnx.GraphProto, batch: tuple[int, int, int]) -> Shapes:
    """Return (min, opt, max) shapes of every input whose first axis is dynamic; the other axes must be fixed.

    Args:
        graph: The model's.
        batch: (min, opt, max) of the first axis.

    Raises:
        BackendError: If another axis is dynamic or of no possible length, or an input has no shape.
    """
    initializers = {tensor.name for tensor in graph.initializer}
    profile: Shapes = {}
    for tensor in graph.input:
        if tensor.name in initializers:
            continue
        if not tensor.type.tensor_type.HasField("shape"):
            raise BackendError(f"The input '{tensor.name}' of the model has no shape.", "Export the model with shapes.")
        dims = tensor.type.tensor_type.shape.dim
        fixed = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
        for axis, size in enumerate(fixed[1:], start=1):
            if size is None:
                where = f"Axis {axis} ('{dims[axis].dim_param}') of the input '{tensor.name}'"
                raise BackendError(f"{where} is dynamic; only the batch may be.", "Export it with that size fixed.")
            if not 1 <= size <= MAX_EXTENT:
                where = f"Axis {axis} of the input '{tensor.name}'"
                raise BackendError(f"{where} has {size} elements, no number for an engine.", "Export the model again.")
        if fixed and fixed[0] is None:
            rest = [size for size in fixed[1:] if size is not None]
            profile[tensor.name] = ([batch[0], *rest], [batch[1], *rest], [batch[2], *rest])
    return profile


def _header(planned: Planned, options: Options, version: str, engine: Path) -> dict[str, Any]:
    measured, target = FileDigest.of(engine), planned.situation.target
    profile = {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in planned.profile.items()}
    return {
        "backend": planned.situation.backend.name,
        "version": version,
        "target": target.name,
        "sm": f"{target.sm[0]}.{target.sm[1]}",
        "profile": profile,
        "precision": planned.situation.precision,
        "precision_reason": planned.situation.precision_reason,
        "onnx_sha256": planned.onnx_sha256,
        "engine_sha256": measured.sha256,
        "engine_bytes": measured.size,
        "sparse_weights": planned.sparse,
        "options": options.as_dict(),
    }


def _read_layers(path: Path) -> dict[str, Any]:
    """Return the layers.json of an export.

    Raises:
        ArtifactError: If the file is none.
    """
    try:
        layers = read_json(path)
        if not all(isinstance(row["name"], str) for row in layers["layers"]):
            raise ValueError("a layer has no name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not the export's layer list: {error}.", "Export the model again.") from None
    return dict(layers)
