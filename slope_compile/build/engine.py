"""From an ONNX file to an engine for one target, and to what the engine really holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from slope_compile.artifacts import FileDigest, read_json
from slope_compile.build.addresses import TUNABLES
from slope_compile.build.rows import engine_rows, summarize
from slope_compile.build.worker import Request, Shapes
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.events import Events
from slope_compile.placement.apply import placed_model
from slope_compile.placement.choose import place_all
from slope_compile.qdq.activations import quantized_layers
from slope_compile.qdq.checks import check_scale, check_zero_point
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.tensors import load_model
from slope_compile.recipe import BatchRange, BuildSection
from slope_compile.targets.backends import Backend, choose_backend, require_buildable
from slope_compile.targets.gpu import find_gpu
from slope_compile.targets.target import Target, find_target

# The worker imports what this process would: same interpreter, same search path, whatever the working directory.
_WORKER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from slope_compile.build.worker import main; main()"
# TensorRT orders some of what it writes by address: of 40 builds of one model about two had other bytes. So the worker
# gets what makes addresses repeat: no address randomization (ADDR_NO_RANDOMIZE; a kernel that forbids it costs only
# that), a fixed hash seed, nothing whose length depends on where and by whom it is run, and `addresses.py`. Threads of
# the library that race are left: about one build in 240, so ahead of time the bytes that were built twice are taken.
MOST_BUILDS = 3
_PASSED_ON = ("PATH", "HOME", "LD_LIBRARY_PATH", "LANG", "LC_", "TMPDIR", "CUDA", "NVIDIA", "VIRTUAL_ENV")
_FIXED_ADDRESSES = (
    "import ctypes, os, sys; ctypes.CDLL(None).personality(0x0040000); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def build_run(section: BuildSection, target: str, export: Path, out: Path, events: Events) -> None:
    """Build one target of a run.

    Args:
        section: The recipe's `build`.
        target: Name of the target.
        export: The finished export stage: model.onnx and layers.json.
        out: Empty folder for model.engine, layers.json, build.log and, where the backend has one, timing.cache.
        events: Who is told.

    Raises:
        BackendError: As `build_engine`.
        ArtifactError: If the export is damaged.
    """
    layers = _read_layers(export / "layers.json")
    build_engine(export / "model.onnx", target, section.backend, section.batch, out, events, layers)


def build_engine(
    model: Path,
    target: str,
    backend: str,
    batch: BatchRange,
    out: Path,
    events: Events,
    layers: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build an engine and read back what it holds.

    Args:
        model: An ONNX file; only the batch axis may be dynamic.
        target: Name of the target.
        backend: `auto`, `tensorrt` or `tensorrt-rtx`.
        batch: Batch sizes of the optimization profile.
        out: Folder for model.engine, layers.json, build.log and, where the backend has one, timing.cache.
        events: Who is told.
        layers: The export's layers.json, where the model comes from our export.

    Returns:
        What layers.json holds: `header` (for `check_engine`), `summary`, `layers`.

    Raises:
        BackendError: If there is no such target or backend, the backend cannot build for the target here, or it fails.
        ArtifactError: If the model cannot be read.
    """
    aim = find_target(target)
    gpu = find_gpu()
    chosen = choose_backend(backend, gpu)
    require_buildable(chosen, aim, gpu)
    events.progress("build", 0, 3, "placing weights")
    weights = coded_weights(model)
    if findings := [str(found) for weight in weights for found in (*check_scale(weight), *check_zero_point(weight))]:
        raise ArtifactError(
            f"{model}: {'; '.join(findings[:3])}.",
            "TensorRT wants positive scales and zero points of 0: quantize it so.",
        )
    places = place_all(weights, chosen, quantized_layers(model))
    profile = batch_profile(load_model(model).graph, batch.resolved(aim.opt_batch))
    sparse = any(is_sparse(weight) for weight in weights)
    with tempfile.TemporaryDirectory(prefix="placed.", dir=out) as folder:
        placed = placed_model(model, weights, places, chosen, Path(folder))
        graph = load_model(placed).graph
        events.progress("build", 1, 3, f"{chosen.title} for {aim.name}")
        request = Request(chosen.name, placed.name, aim.sm, profile, sparse)
        engine, cache, version = _repeated(request, chosen, placed.parent, out / "build.log")
    events.progress("build", 2, 3, "reading the engine's layer list")
    (out / "model.engine").write_bytes(engine)
    if cache:
        (out / "timing.cache").write_bytes(cache)
    log = (out / "build.log").read_text(encoding="utf-8", errors="replace")
    rows = engine_rows(weights, places, graph, log, chosen, layers)
    for row in rows:
        if row["placement"] != "float" and not row["engine"]["held"]:
            events.warning("build", f"{row['name']}: {row['engine']['note']}")
    header = _header(chosen, version, aim, profile, model, out / "model.engine", sparse)
    result = {"header": header, "summary": summarize(rows, log, chosen), "layers": rows}
    (out / "layers.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    events.progress("build", 3, 3, f"{len(engine)} bytes")
    return result


def batch_profile(graph: onnx.GraphProto, batch: tuple[int, int, int]) -> Shapes:
    """Return (min, opt, max) shapes of every input whose first axis is dynamic; the other axes must be fixed.

    Args:
        graph: The model's.
        batch: (min, opt, max) of the first axis.

    Raises:
        BackendError: If another axis is dynamic, or an input has no shape.
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
        if fixed and fixed[0] is None:
            rest = [size for size in fixed[1:] if size is not None]
            profile[tensor.name] = ([batch[0], *rest], [batch[1], *rest], [batch[2], *rest])
    return profile


def _repeated(request: Request, backend: Backend, folder: Path, log: Path) -> tuple[bytes, bytes, str]:
    """Return the first result that two builds agree on; of three that all differ, the last: the log is its own.

    Where kernels are measured no two builds agree, and one is made.
    """
    results = [run_worker(request, backend, folder, log)]
    while not backend.needs_gpu and len(results) < MOST_BUILDS:
        again = run_worker(request, backend, folder, log)
        if again in results:
            return again
        results.append(again)
    return results[-1]


def run_worker(request: Request, backend: Backend, folder: Path, log: Path) -> tuple[bytes, bytes, str]:
    """Build in a process of its own and return engine, timing cache (empty where there is none) and version.

    Args:
        request: What to build.
        backend: With what.
        folder: Where the request's model is.
        log: Where everything that the process prints goes.

    Raises:
        BackendError: If the backend refuses the model, or dies.
        RuntimeError: If the worker has a bug.
    """
    command = [sys.executable, "-S", "-c", _FIXED_ADDRESSES, "-c", _WORKER, json.dumps(_search_path())]
    environment = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    with log.open("wb") as stderr:
        # subprocess.run ends the process if this one is interrupted.
        done = subprocess.run(
            command,
            input=request.to_json().encode(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**environment, "PYTHONHASHSEED": "0", "GLIBC_TUNABLES": TUNABLES},
            cwd=folder,
            check=False,
        )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BackendError(
            f"{backend.title} died ({name}) while it built the engine. Its last words: {_tail(log)}",
            "Out of memory? Otherwise report it to NVIDIA with the model.",
        )
    if done.returncode:
        raise RuntimeError(f"the build process failed with exit code {done.returncode}: {_tail(log)}")
    head, _, body = done.stdout.partition(b"\n")
    answer = json.loads(head)
    if "problem" in answer:
        raise BackendError(answer["problem"], answer["remedy"])
    engine, cache = body[: answer["engine"]], body[answer["engine"] :]
    if len(cache) != answer["timing_cache"]:
        raise RuntimeError(f"the build process sent {len(body)} bytes, not {answer['engine'] + answer['timing_cache']}")
    return engine, cache, answer["version"]


def _search_path() -> list[str]:
    """Return the import path without the working directory, unless this very package is in it."""
    home = Path(__file__).parents[2]
    return [entry for entry in sys.path if entry and (Path(entry) != Path.cwd() or Path(entry) == home)]


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return " / ".join(line.strip() for line in lines if line.strip())[-600:]


def _header(
    backend: Backend, version: str, target: Target, profile: Shapes, model: Path, engine: Path, sparse: bool
) -> dict[str, Any]:
    measured = FileDigest.of(engine)
    return {
        "backend": backend.name,
        "version": version,
        "target": target.name,
        "sm": f"{target.sm[0]}.{target.sm[1]}",
        "profile": {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in profile.items()},
        "onnx_sha256": FileDigest.of(model).sha256,
        "engine_sha256": measured.sha256,
        "engine_bytes": measured.size,
        "sparse_weights": sparse,
    }


def _read_layers(path: Path) -> dict[str, Any]:
    try:
        layers = read_json(path)
        if not all(isinstance(row["name"], str) for row in layers["layers"]):
            raise ValueError("a layer has no name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} is not the export's layer list: {error}.", "Export the model again.") from None
    return dict(layers)
