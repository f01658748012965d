"""`slope-compile doctor`: versions, GPUs, and what each missing piece would enable."""

from __future__ import annotations

from slope_compile import machine
from slope_compile_cli import options
from slope_compile_cli.console import Console

PIECES = (
    # package, what it is for, what to install
    ("torch", "train, export, and parity against the trained model", "pip install 'slope-compile[train]'"),
    ("timm", "models named timm/…", "pip install 'slope-compile[train]'"),
    ("onnxruntime", "parity and the task metric in `verify`", "pip install slope-compile"),
    ("tensorrt-rtx", "engines built ahead of time, without a GPU", "pip install 'slope-compile[rtx]'"),
    ("tensorrt", "engines for A100 and Jetson, on a machine with that GPU", "pip install 'slope-compile[tensorrt]'"),
)


def command(json: options.Json = False) -> None:
    """Tell versions and GPUs, and what each missing piece enables; paste it into a bug report."""
    from slope_compile.targets.gpu import find_gpu

    console = Console(json)
    versions, facts = machine.versions(), machine.machine()
    console.table("versions", ["package", "version"], list(versions.items()))
    console.say(f"machine: {facts['platform']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.1f} GiB")
    for gpu in facts["gpus"]:
        console.say(
            f"gpu: {gpu['name']}, SM {gpu['compute_cap']}, {gpu['memory.total']}, driver {gpu['driver_version']}"
        )
    if not facts["gpus"] and (gpu := find_gpu()):  # Jetson's nvidia-smi tells nothing
        console.say(f"gpu: {gpu}")
    elif not facts["gpus"]:
        console.say("gpu: none; engines are built (tensorrt-rtx) but not run, and `verify` lists them as not checked")
    missing = [{"package": p, "enables": what, "install": how} for p, what, how in PIECES if p not in versions]
    if missing:
        console.table("missing", ["package", "enables", "install"], [list(row.values()) for row in missing])
    console.result({"versions": versions, "machine": facts, "missing": missing})
