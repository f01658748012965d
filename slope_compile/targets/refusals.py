"""What a target, a backend or this machine cannot do: refused before anything is built, with the reason and a remedy.

| asked for | refused where | source |
|---|---|---|
| a target | TensorRT-RTX has no code generator for its SM | `trt.ComputeCapability` of 1.7.1 |
| a TensorRT | no row of targets.yaml holds it (TensorRT 11 on JetPack 6) | release notes 11.4.1 |
| a target | TensorRT, and the GPU here is another one or none | TensorRT measures kernels where it builds |
| `dla` | no DLA, no such core, TensorRT without it, or a batch that varies | "Working with DLA", 11.4.1 |
| `hardware_compatibility` | Jetson, a GPU before Ampere, a version without it | NvInfer.h; developer guide 8.6 |
| `workspace_gib` | more than the target's memory | data sheet |
| `timing_cache`, `version_compatible`, `hardware_compatibility` | TensorRT-RTX | tried with 1.7.1 |
| `refit`, `strip` | TensorRT-RTX where no GPU is | tried with 1.7.1 |
"""

from __future__ import annotations

from collections.abc import Collection

from slope_compile.errors import BackendError
from slope_compile.recipe import BuildSection
from slope_compile.targets.backends import BACKENDS, Backend
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.target import Target
from slope_compile.targets.versions import has

AMPERE = (8, 0)


def require_possible(section: BuildSection, target: Target, backend: Backend, version: str) -> None:
    """Raise unless that backend, in that version, can build for the target as the recipe asks; on whatever machine.

    Args:
        section: How to build.
        target: The GPU.
        backend: Who builds.
        version: Its version: the installed one, or the one expected on the device.

    Raises:
        BackendError: With the reason.
    """
    _require_target(target, backend, version)
    _require_dla(section, target, backend, version)
    _require_hardware_compatibility(section, target, backend, version)
    if section.workspace_gib is not None and section.workspace_gib > target.memory_gib:
        memory = f"{target.memory_gib:g} GiB of memory"
        raise BackendError(
            f"`build.workspace_gib` is {section.workspace_gib:g}, and {target} has {memory}.",
            "Give less, or leave it out: TensorRT then takes what the GPU has.",
        )
    for key, reason in backend.refused.items():
        value = getattr(section, key)
        if value not in (None, False, "none"):
            raise BackendError(
                f"`build.{key}` is {str(value).lower()}, and {backend.title} does not take it: {reason}.",
                "Leave it out, or build with `build.backend: tensorrt`.",
            )


def require_buildable(section: BuildSection, target: Target, backend: Backend, version: str, gpu: Gpu | None) -> None:
    """Raise unless the backend can build for the target on this machine as the recipe asks.

    Args:
        section: How to build.
        target: The GPU to build for.
        backend: Who builds.
        version: Its version, the installed one.
        gpu: The GPU of this machine.

    Raises:
        BackendError: With the reason.
    """
    require_gpu(target, backend, gpu)
    require_possible(section, target, backend, version)
    if backend.rtx and gpu is None and (section.refit or section.strip):
        key = "refit" if section.refit else "strip"
        raise BackendError(
            f"{backend.title} compiles an engine for `build.{key}` on a GPU only, and there is none here.",
            f"Leave `build.{key}` out, or build on a machine with a GPU.",
        )


def require_gpu(target: Target, backend: Backend, gpu: Gpu | None) -> None:
    """Raise if a backend builds only where the target's GPU is, and it is not here.

    Args:
        target: The GPU to build for.
        backend: Who builds; it need not be installed.
        gpu: The GPU of this machine.

    Raises:
        BackendError: With the reason.
    """
    if not backend.needs_gpu or (gpu is not None and gpu.sm == target.sm):
        return
    if gpu is None:
        problem = f"TensorRT measures kernels on the GPU it builds for, and there is none here; target {target}."
    else:
        problem = f"TensorRT builds only for the GPU of its machine, which is {gpu}, not {target}."
    raise BackendError(problem, _where(target))


def notes(
    section: BuildSection, target: Target, backend: Backend, version: str, sparse: bool, stored: Collection[str]
) -> list[str]:
    """Return what is no reason to refuse, and still not what one may expect.

    Args:
        section: How to build.
        target: The GPU.
        backend: Who builds.
        version: Its version.
        sparse: Whether sparse kernels may be chosen.
        stored: ONNX types of the weights as they were exported.
    """
    found = [
        f"{dtype} codes travel in a wider type: {backend.title} cannot import them"
        for dtype in sorted(backend.cannot_import.intersection(stored))
    ]
    if backend.rtx and target.rtx == "builds":
        found.append(f"{backend.title} builds for {target.name}, but its support matrix does not name that GPU")
    if sparse and target.sparse_speedup == 1:
        found.append(f"{target.name} has no sparse tensor cores: 2:4 weights are multiplied as dense ones")
    if sparse and section.refit:
        found.append("a layer whose kernel is sparse can be refitted with 2:4 weights only")
    if section.refit and has("refit_drops_bias", backend.name, version):
        found.append(f"refit in {backend.title} {version} may drop a GEMM's bias (its known issues): verify the engine")
    if section.dla is not None:
        found.append(
            "what the DLA cannot run, Q/DQ before TensorRT 11 included, falls back to the GPU: read layers.json"
        )
    return found


def _require_target(target: Target, backend: Backend, version: str) -> None:
    if not backend.needs_gpu:
        if target.sm not in backend.ahead_of_time:
            where = (
                f"on the device itself, from a bundle: `slope-compile bundle RUN --target {target.name}`"
                if target.on_device
                else "on a machine with that GPU, with `build.backend: tensorrt`"
            )
            raise BackendError(
                f"{backend.title} has no code generator for SM {target.sm[0]}.{target.sm[1]}, target {target}.",
                f"Build {where}.",
            )
    elif target.system_of(version) is None:
        rows = ", ".join(f"{row.system}: {row.first} to below {row.below}" for row in target.tensorrt)
        raise BackendError(
            f"TensorRT {version} does not run on {target}, which takes {rows}.", "Install one of these versions."
        )


def _require_dla(section: BuildSection, target: Target, backend: Backend, version: str) -> None:
    if section.dla is None:
        return
    if backend.rtx or target.dla_cores == 0:
        who = backend.title if backend.rtx else str(target)
        raise BackendError(f"`build.dla` is {section.dla}, and {who} has no DLA.", "Leave it out, or use target orin.")
    if section.dla >= target.dla_cores:
        last = target.dla_cores - 1
        raise BackendError(f"`build.dla` is {section.dla}; the cores of {target} are 0 to {last}.", "Name one of them.")
    if not has("dla", backend.name, version):
        raise BackendError(
            f"TensorRT {version} has no DLA: 10.7 was the last before 11.4.1, on JetPack 7.2.2.",
            "Leave out `build.dla`.",
        )
    low, opt, high = section.batch.resolved(target.opt_batch)
    if not low == opt == high:
        raise BackendError(
            f"The DLA takes one batch size, and `build.batch` is {low}, {opt}, {high}.",
            f"Set min, opt and max of `build.batch` to the same number, such as {opt}.",
        )


def _require_hardware_compatibility(section: BuildSection, target: Target, backend: Backend, version: str) -> None:
    level = section.hardware_compatibility
    if level == "none" or backend.rtx:
        return
    key = f"`build.hardware_compatibility: {level}`"
    if target.on_device:
        raise BackendError(f"{key} is not supported on Jetson; target {target}.", "Leave it out.")
    if level == "ampere-plus" and target.sm < AMPERE:
        raise BackendError(f"{key} needs a GPU of SM 8.0 or later; target {target}.", "Leave it out.")
    if level == "same-compute-capability" and not has("same_compute_capability", backend.name, version):
        raise BackendError(f"TensorRT {version} does not know {key}.", "Leave it out, or use a later TensorRT.")


def _where(target: Target) -> str:
    """Say where an engine for a target can be built."""
    if target.on_device:
        return f"Build on the device itself, from a bundle: `slope-compile bundle RUN --target {target.name}`."
    rtx = BACKENDS["tensorrt-rtx"]
    ahead = ", or with `build.backend: tensorrt-rtx`, which needs none" if target.sm in rtx.ahead_of_time else ""
    return f"Build on a machine with that GPU{ahead}."
