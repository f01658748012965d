"""`bench`: an engine of ours against the dense FP16 engine of the same model, where its GPU is; else `not checked`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slope_compile import machine
from slope_compile.artifacts import FileDigest
from slope_compile.bench.measure import Plan
from slope_compile.bench.subject import ENDS, REMEDY, Subject, find_subject
from slope_compile.build.header import check_engine
from slope_compile.child import ask
from slope_compile.errors import ArtifactError, BackendError, SlopeCompileError
from slope_compile.events import Events
from slope_compile.recipe import BatchRange, BuildSection
from slope_compile.targets.gpu import Gpu, find_gpu

_WORKER = "from slope_compile.bench.worker import main; main()"


def bench(
    engine: Path, onnx: Path | None = None, events: Events | None = None, plan: Plan | None = None
) -> dict[str, Any]:
    """Measure an engine at its opt shape: latency, throughput, and the ratio to the dense FP16 engine.

    Args:
        engine: An engine file of ours: in a run's build/TARGET, or with its ENGINE.layers.json beside it.
        onnx: The exported model, from which the dense engine is built; default: the run's, if it still is that one.
        events: Who is told.
        plan: How much is measured.

    Returns:
        `status` (`measured` or `not checked`, with `reason`), `target`, `backend`, `version`, `shapes`, `batch`, `gpu`,
        `engine` and `dense` (latencies in ms, inferences and items a second, whether as a CUDA graph), `faster`.

    Raises:
        ArtifactError: If the engine is missing or not the one that its build wrote down, or the model is another one.
        BackendError: If an engine does not run, though its GPU and its runtime are here.
    """
    events, plan = events or Events(), plan or Plan()
    subject = find_subject(engine, onnx)
    header = subject.header
    about = {key: header[key] for key in ("target", "backend", "version")}
    about |= {"engine_file": str(engine), "shapes": subject.shapes, "batch": subject.batch}
    gpu, reason = _runnable(subject)
    if gpu is None or reason:
        return {"status": "not checked", "reason": reason, **about}
    with tempfile.TemporaryDirectory(prefix="slope-compile-bench.") as folder:
        engines = {"engine": {"path": str(engine.resolve()), "sha256": header["engine_sha256"]}}
        dense: dict[str, Any] = {}
        try:
            engines["dense"] = _dense(subject, Path(folder), events)
        except SlopeCompileError as error:  # the engine itself can still be measured
            dense = _no_dense(str(error))
        except ImportError as error:  # a device may have none of what rewrites models
            dense = _no_dense(f"{error}. Install onnx-ir here.")
        events.progress("bench", 1, 2, "measuring")
        before = machine.clocks()
        request = {"backend": header["backend"], "engines": engines, "shapes": subject.shapes, "batch": subject.batch}
        found = _run({**request, "plan": asdict(plan)})
    if "not_checked" in found:
        return {"status": "not checked", "reason": found["not_checked"], **about}
    clocks = {"before": before, "after": machine.clocks()}
    events.progress("bench", 2, 2, "done")
    return (
        {"status": "measured", **about, "gpu": {"name": gpu.name, "clocks": clocks}, "plan": asdict(plan)}
        | dense
        | found
    )


def _runnable(subject: Subject) -> tuple[Gpu | None, str]:
    """Return the GPU, and why the engine cannot run here, empty if it can."""
    header = subject.header
    gpu = find_gpu()
    if gpu is None:
        built = f"the engine was built for SM {header['sm']} ({header['target']})"
        return None, f"{built}, and this machine has no NVIDIA GPU"
    try:
        check_engine(header, gpu)
    except BackendError as error:
        return gpu, error.problem
    return gpu, ""


def _dense(subject: Subject, folder: Path, events: Events) -> dict[str, str]:
    """Build the dense FP16 engine of the same model, for the same shapes and with the same settings."""
    if subject.onnx is None:
        raise BackendError(subject.no_onnx, "Name it with --onnx.")
    from slope_compile.build.engine import compile_planned, plan_build
    from slope_compile.placement.dense import dense_twin
    from slope_compile.placement.situation import situation_of
    from slope_compile.targets.backends import BACKENDS
    from slope_compile.targets.target import find_target

    events.progress("bench", 0, 2, "building the dense FP16 engine")
    quiet = Events()  # its layers are not what was asked about
    section = dense_section(subject.header)
    backend, target = BACKENDS[section.backend], find_target(subject.header["target"])
    model = dense_twin(subject.onnx, folder)
    situation = situation_of(section, target, backend, subject.header["version"], model)
    planned = plan_build(model, situation, section, folder, quiet)
    compile_planned(planned, section, folder, quiet)
    path = folder / "model.engine"
    return {"path": str(path), "sha256": FileDigest.of(path).sha256}


def _no_dense(reason: str) -> dict[str, Any]:
    return {"dense": {"status": "not checked", "reason": f"no dense FP16 engine: {reason}"}}


def dense_section(header: Mapping[str, Any]) -> BuildSection:
    """Return how the dense engine is built: as the other, but in FP16 and for this process alone.

    Args:
        header: `header` of the other's layers.json.

    Raises:
        ArtifactError: If the header names settings that no build takes.
    """
    options = header["options"]
    profile = next(iter(header["profile"].values()), None)
    try:
        return BuildSection(
            backend=header["backend"],
            batch=BatchRange(**{end: profile[end][0] for end in ENDS}) if profile else BatchRange(),
            precision="fp16",
            workspace_gib=None if options["workspace"] is None else options["workspace"] / 2**30,
            optimization_level=options["optimization_level"],
            hardware_compatibility=options["hardware_compatibility"],
            dla=options["dla"],
        )
    except (ValueError, TypeError, KeyError) as error:  # pydantic's is a ValueError
        problem = " ".join(str(error).split())
        raise ArtifactError(f"The engine's layers.json names settings that no build takes: {problem}", REMEDY) from None


def _run(request: Mapping[str, Any]) -> dict[str, Any]:
    """Measure in a process of its own, which TensorRT may choose its libraries for, and may crash.

    Raises:
        BackendError: If an engine does not load or run.
    """
    answer: dict[str, Any] = json.loads(ask(_WORKER, json.dumps(request).encode(), "measured"))
    if "problem" in answer:
        raise BackendError(answer["problem"], answer["remedy"])
    return answer
