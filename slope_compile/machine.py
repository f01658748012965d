"""This machine and the versions on it: for the manifest, for `doctor`, for a bug report."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from slope_compile._version import __version__

PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "torchmetrics", "onnxscript", "scikit-learn", "numpy", "safetensors",
    "zstandard", "onnx", "onnx-ir", "onnxruntime", "polygraphy", "tensorrt", "tensorrt-rtx",
)  # fmt: skip


def version_of(package: str) -> str | None:
    """Return the installed version of a package, without importing it, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Return the versions of slope-compile, Python and every package of ours that is installed."""
    found = {"slope-compile": __version__, "python": platform.python_version()}
    return found | {name: version for name in PACKAGES if (version := version_of(name))}


def machine() -> dict[str, Any]:
    """Return processor, cores, memory (bytes) and GPUs of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"platform": platform.platform(), "cores": os.cpu_count(), "memory_bytes": memory, "gpus": gpus()}


def gpus() -> list[dict[str, str]]:
    """Return name, compute capability, memory and driver of each NVIDIA GPU, as nvidia-smi tells them."""
    return _ask_nvidia_smi(("name", "compute_cap", "memory.total", "driver_version"))


def clocks() -> dict[str, str] | None:
    """Return SM and memory clock, and temperature of the first GPU, as nvidia-smi tells them; None where it does not.

    Nothing is set: clocks that a measurement found are reported with it.
    """
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu")
    found = _ask_nvidia_smi(fields)
    return found[0] if found else None


def _ask_nvidia_smi(fields: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the fields of each GPU; empty where there is no nvidia-smi, or it does not know."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(fields, map(str.strip, line.split(",")), strict=False)) for line in answer.splitlines() if line]


def facts(started: float) -> dict[str, Any]:
    """Return what a manifest tells of a finished stage: wall time, peak memory, versions, this machine.

    Args:
        started: `time.monotonic()` when it began; `restart_peak_memory` was called then.
    """
    wall = round(time.monotonic() - started, 2)
    return {"wall_s": wall, "peak_bytes": peak_memory(), "versions": versions(), "machine": machine()}


def restart_peak_memory() -> None:
    """Let `peak_memory` count from here; where the kernel does not allow that, it goes on counting from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the peak resident memory of this process, without its children, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
