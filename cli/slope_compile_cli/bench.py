"""`slope-compile bench`: how fast an engine is, against the dense FP16 engine of the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from slope_compile.errors import StorageError
from slope_compile.events import Events
from slope_compile_cli import options
from slope_compile_cli.console import Console, StageProgress

Engine = Annotated[Path, typer.Argument(help="RUN/build/TARGET/model.engine, or an engine with its .layers.json.")]
Onnx = Annotated[
    Path | None, typer.Option("--onnx", help="The exported model, to build the dense engine from. Default: the run's.")
]
COLUMNS = ("engine", "p50 ms", "p90 ms", "p99 ms", "mean ms", "inferences/s", "items/s", "CUDA graph")


def command(engine: Engine, onnx: Onnx = None, json: options.Json = False) -> None:
    """Measure latency and throughput at the opt shape; where the engine's GPU is not here: not checked."""
    console = Console(json)
    console.result(measure(console, engine, onnx))


def measure(console: Console, engine: Path, onnx: Path | None = None) -> dict[str, Any]:
    """Measure an engine, print what was found, keep it in the engine's run, and return it."""
    from slope_compile.bench.run import bench

    progress = StageProgress(console)
    with progress.drawing():
        found = bench(engine, onnx, Events(listeners=[progress]))
    if found["status"] != "measured":
        console.say(f"{engine}: speed not checked: {found['reason']}")
    else:
        _print(console, engine, found)
    return {**found, **_kept(console, engine, found)}


def _kept(console: Console, engine: Path, found: Mapping[str, Any]) -> dict[str, str]:
    """Keep the measurement in the engine's run; where that fails, the figures have been told all the same."""
    from slope_compile.bench.keep import keep

    try:
        path = keep(engine, found)
    except StorageError as error:
        console.say(f"not kept for `verify --baseline`: {error}")
        return {}
    if path is None:
        return {}
    console.say(f"kept: {path}")
    return {"kept": str(path)}


def _print(console: Console, engine: Path, found: Mapping[str, Any]) -> None:
    rows = [_row(name, found[name]) for name in ("engine", "dense") if "latency_ms" in found.get(name, {})]
    console.table(f"{engine} on {found['gpu']['name']}, {_shapes(found['shapes'])}", COLUMNS, rows)
    for name in ("engine", "dense"):
        if reason := found.get(name, {}).get("no_cuda_graph"):
            console.say(f"{name}: measured without a CUDA graph: {reason}")
    clocks = found["gpu"]["clocks"]
    console.say(f"clocks, not set by us: before {_clocks(clocks['before'])}; after {_clocks(clocks['after'])}")
    if "faster" not in found:
        console.say(f"against the dense FP16 engine: not checked: {found['dense']['reason']}")
        return
    faster = found["faster"]
    for what in ("latency", "throughput"):
        one = faster[what]
        console.say(
            f"{what}: {one['ratio']:.3f} times the speed of the dense FP16 engine, "
            f"{100 * faster['confidence']:.0f} % interval {one['low']:.3f} to {one['high']:.3f}"
        )


def _row(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    latency = [f"{one['latency_ms'][key]:.3f}" for key in ("p50", "p90", "p99", "mean")]
    rates = [f"{one[key]:.1f}" for key in ("inferences_per_s", "items_per_s")]
    return ("dense FP16" if name == "dense" else name, *latency, *rates, "yes" if one["cuda_graph"] else "no")


def _shapes(shapes: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()) or "fixed shapes"


def _clocks(clocks: Mapping[str, str] | None) -> str:
    return "not checked" if clocks is None else f"SM {clocks['clocks.sm']}, memory {clocks['clocks.mem']}"
