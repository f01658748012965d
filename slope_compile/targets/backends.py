"""The backends of `build`, as one table of their differences, and the choice among them."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any

from slope_compile.errors import BackendError, nearest
from slope_compile.machine import version_of
from slope_compile.targets.gpu import Gpu, find_gpu
from slope_compile.targets.target import Target

SM = tuple[int, int]


@dataclass(frozen=True)
class Backend:
    """What makes one TensorRT differ from another.

    Args:
        name: As in a recipe.
        title: As people call it.
        module: What is imported.
        package: The distribution that carries the version.
        extra: Our extra that installs it.
        ahead_of_time: Compute capabilities it builds for without a GPU; empty: it builds for the GPU that is here.
        conv_int4: Whether a convolution may read INT4 weights.
        gemm_int4_blocks: Block lengths of INT4 weights that a GEMM takes; None: any, per-channel steps included.
        cannot_import: ONNX types its parser refuses in an initializer.
        strongly_typed_before: Major version from which networks are strongly typed without being asked; 0: always.
        timing_cache: Whether a build leaves one (TensorRT-RTX measures at run time: its cache calls do nothing).
        rtx: Whether Polygraphy must be told that it is TensorRT-RTX.
    """

    name: str
    title: str
    module: str
    package: str
    extra: str
    ahead_of_time: frozenset[SM]
    conv_int4: bool
    gemm_int4_blocks: frozenset[int] | None
    cannot_import: frozenset[str]
    strongly_typed_before: int
    timing_cache: bool
    rtx: bool

    @property
    def needs_gpu(self) -> bool:
        """Whether a build needs the target GPU in this machine."""
        return not self.ahead_of_time

    @property
    def remedy(self) -> str:
        """How to install it."""
        return f"Install it: pip install 'slope-compile[{self.extra}]'"

    def installed(self) -> bool:
        """Whether Python would find its module; nothing is imported."""
        return importlib.util.find_spec(self.module) is not None

    def network_arguments(self, version: str) -> dict[str, Any]:
        """Return the keyword arguments of Polygraphy's CreateNetwork for an installed version such as `10.3.0`."""
        return {"strongly_typed": int(version.split(".")[0]) < self.strongly_typed_before}

    def config_arguments(self, sm: SM, sparse: bool) -> dict[str, Any]:
        """Return the keyword arguments of Polygraphy's CreateConfig or CreateConfigRTX, but for the profiles.

        Precision is in the graph, never in a flag. TF32 is TensorRT's default and TensorRT-RTX's, and Polygraphy would
        turn it off for the first: one numeric contract for both.
        """
        if self.rtx:
            return {"sparse_weights": sparse, "compute_capabilities": [sm]}
        return {"sparse_weights": sparse, "tf32": True}


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="tensorrt",
            title="TensorRT",
            module="tensorrt",
            package="tensorrt",
            extra="tensorrt",
            ahead_of_time=frozenset(),
            conv_int4=False,
            gemm_int4_blocks=frozenset({64, 128}),
            cannot_import=frozenset({"INT2", "UINT2", "UINT4"}),
            strongly_typed_before=11,
            timing_cache=True,
            rtx=False,
        ),
        Backend(
            name="tensorrt-rtx",
            title="TensorRT-RTX",
            module="tensorrt_rtx",
            package="tensorrt-rtx",
            extra="rtx",
            ahead_of_time=frozenset({(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)}),
            conv_int4=True,
            gemm_int4_blocks=None,
            cannot_import=frozenset({"INT2", "UINT2", "UINT4"}),
            strongly_typed_before=0,
            timing_cache=False,
            rtx=True,
        ),
    )
}


def choose_backend(name: str, gpu: Gpu | None) -> Backend:
    """Return the backend of that name; `auto` is TensorRT where it and a GPU are here, else TensorRT-RTX.

    Args:
        name: `auto` or a key of the table.
        gpu: The GPU of this machine.

    Raises:
        BackendError: If there is no such backend, or it is not installed.
    """
    tensorrt, rtx = BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]
    if name == "auto":
        if gpu is not None and tensorrt.installed():
            return tensorrt
        if rtx.installed():
            return rtx
        what = "neither TensorRT with a GPU nor TensorRT-RTX is here"
        raise BackendError(f"There is nothing to build an engine with: {what}.", rtx.remedy)
    if name not in BACKENDS:
        raise BackendError(f"There is no backend '{name}'.", nearest(name, ["auto", *BACKENDS]))
    if not BACKENDS[name].installed():
        raise BackendError(f"{BACKENDS[name].title} is not installed.", BACKENDS[name].remedy)
    return BACKENDS[name]


def require_buildable(backend: Backend, target: Target, gpu: Gpu | None) -> None:
    """Raise unless the backend can build for the target on this machine.

    Raises:
        BackendError: With the reason.
    """
    sm = f"SM {target.sm[0]}.{target.sm[1]}"
    if backend.needs_gpu:
        if gpu is None:
            raise BackendError(
                f"TensorRT measures kernels on the GPU it builds for, and there is none here; target {target}.",
                f"Build on a machine with that GPU{_ahead_of_time_remedy(target)}.",
            )
        if gpu.sm != target.sm:
            raise BackendError(
                f"TensorRT builds only for the GPU of its machine, which is {gpu}, not {target}.",
                f"Build on a machine with that GPU{_ahead_of_time_remedy(target)}.",
            )
    elif target.sm not in backend.ahead_of_time:
        where = f"on the {target.devices} itself" if target.on_device else "on a machine with that GPU"
        later = " Bundles that take an export to a Jetson come with a later release." if target.on_device else ""
        raise BackendError(
            f"{backend.title} has no code generator for {sm}, target {target}.",
            f"Build with `build.backend: tensorrt` {where}.{later}",
        )


def _ahead_of_time_remedy(target: Target) -> str:
    rtx = BACKENDS["tensorrt-rtx"]
    return ", or with `build.backend: tensorrt-rtx`, which needs none" if target.sm in rtx.ahead_of_time else ""


def backend_version(name: str) -> str:
    """Return `BACKEND VERSION` of what `choose_backend(name)` would take here, or `none`; nothing is imported."""
    try:
        backend = choose_backend(name, find_gpu())
    except BackendError:
        return "none"
    return f"{backend.name} {version_of(backend.package) or 'unknown'}"


def select_in_polygraphy(backend: Backend) -> Any:
    """Make Polygraphy use this backend in this process, and return the backend's own module.

    Polygraphy decides once, when its modules are first imported, by an environment variable: it is set for that import
    only, and then put back.

    Raises:
        BackendError: If the backend does not import, or Polygraphy already works with the other one in this process.
    """
    variable = "POLYGRAPHY_USE_TENSORRT_RTX"
    before = os.environ.get(variable)
    os.environ[variable] = "1" if backend.rtx else "0"
    try:
        importlib.import_module("polygraphy.backend.trt")  # binds its modules to one TensorRT
        if backend.rtx:
            importlib.import_module("polygraphy.backend.tensorrt_rtx.config")
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
    from polygraphy import config

    if config.USE_TENSORRT_RTX is not backend.rtx:
        other = BACKENDS["tensorrt" if backend.rtx else "tensorrt-rtx"]
        raise BackendError(
            f"Polygraphy already works with {other.title} in this process, so it cannot use {backend.title}.",
            "Use one backend in a process.",
        )
    try:
        return importlib.import_module(backend.module)
    except (ImportError, OSError) as error:
        raise BackendError(f"{backend.title} is installed but does not import: {error}.", backend.remedy) from None
