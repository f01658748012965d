"""`slope-compile doctor`: versions, GPU, what can be built here, and what is installed but broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from slope_compile import machine
from slope_compile_cli import options
from slope_compile_cli.console import Console

if TYPE_CHECKING:
    from slope_compile.health import Health

BROKEN = 2
PIECES = (
    # package, what it is for, what to install
    ("torch", "train, export, and parity against the trained model", "pip install 'slope-compile[train]'"),
    ("timm", "models named timm/…", "pip install 'slope-compile[train]'"),
    ("onnxruntime", "parity and the task metric in `verify`", "pip install slope-compile"),
    ("tensorrt-rtx", "engines built ahead of time, without a GPU", "pip install 'slope-compile[rtx]'"),
    ("tensorrt", "engines for A100 and Jetson, on a machine with that GPU", "pip install 'slope-compile[tensorrt]'"),
)


def command(json: options.Json = False) -> None:
    """Tell versions, GPU and targets; exit 2 if something installed is broken. Paste it into a bug report."""
    from slope_compile.health import examine

    console = Console(json)
    versions, facts, health = machine.versions(), machine.machine(), examine(Path.cwd())
    versions |= {name: version for name, version in health.backends.items() if name not in versions}  # no metadata
    console.table("versions", ["package", "version"], list(versions.items()))
    _print_machine(console, facts, health)
    _print_targets(console, health)
    missing = [{"package": p, "enables": what, "install": how} for p, what, how in PIECES if p not in versions]
    if missing:
        console.table("missing", ["package", "enables", "install"], [list(row.values()) for row in missing])
    for problem in health.problems:
        console.say(f"broken: {problem.what} {problem.remedy}")
    console.say(f"healthy: {'no' if health.problems else 'yes'}")
    console.result({"versions": versions, "machine": facts, "missing": missing, **_health_json(health)})
    if health.problems:
        raise typer.Exit(BROKEN)


def _print_machine(console: Console, facts: dict[str, Any], health: Health) -> None:
    board = f"{health.board}, " if health.board else ""
    console.say(f"machine: {board}{facts['platform']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.1f} GiB")
    for gpu in facts["gpus"]:
        console.say(
            f"gpu: {gpu['name']}, SM {gpu['compute_cap']}, {gpu['memory.total']}, driver {gpu['driver_version']}"
        )
    if not facts["gpus"] and health.gpu:  # Jetson's nvidia-smi tells nothing
        console.say(f"gpu: {health.gpu}")
    elif not facts["gpus"]:
        console.say("gpu: none; engines are not run here, and `verify` lists them as not checked")
    for target in health.targets_of_gpu():
        console.say(f"target of this GPU: {target}; DLA cores: {target.dla_cores or 'none'}")
    speaks = f"loads, CUDA {health.driver.cuda or 'unknown'}" if health.driver.loads else "not here"
    console.say(f"cuda: driver {speaks}; runtime (to run engines) {'loads' if health.runtime else 'not found'}")
    rights = "" if health.writable else ", and this user may not write there"
    console.say(f"working folder: {health.folder}, {health.free_bytes / 2**30:.1f} GiB free{rights}")


def _print_targets(console: Console, health: Health) -> None:
    rows = []
    for target, refusals in health.refusals.items():
        builders = health.builders(target)
        whom = ", ".join(f"{name} {health.backends[name]}" for name in builders)
        why = " ".join(reason for name, reason in refusals.items() if reason and name in health.backends)
        rows.append((target, whom or None, "" if builders else why or "No TensorRT is installed."))
    console.table("targets", ["target", "built here by", "why not"], rows)


def _health_json(health: Health) -> dict[str, Any]:
    gpu = health.gpu
    return {
        "healthy": not health.problems,
        "problems": [{"problem": problem.what, "remedy": problem.remedy} for problem in health.problems],
        "board": health.board,
        "gpu": None if gpu is None else {"name": gpu.name, "sm": list(gpu.sm)},
        "cuda": {
            "driver": health.driver.loads,
            "version": health.driver.cuda,
            "error": health.driver.error,
            "runtime": health.runtime,
        },
        "targets": {
            target: {"built_by": health.builders(target), "refusals": {k: v for k, v in refusals.items() if v}}
            for target, refusals in health.refusals.items()
        },
        "folder": {"path": str(health.folder), "free_bytes": health.free_bytes, "writable": health.writable},
    }
