"""The backends of `build`, as one table of their differences, and the choice among them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slope_compile.errors import BackendError, nearest
from slope_compile.machine import version_of
from slope_compile.targets.gpu import Gpu, find_gpu
from slope_compile.targets.options import Options
from slope_compile.targets.versions import has

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
        timing_cache: Whether a build leaves one (TensorRT-RTX measures at run time: its cache calls do nothing).
        refused: Keys of a recipe's `build` that do nothing with it, or fail: key -> why.
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
    timing_cache: bool
    refused: Mapping[str, str]
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

    def installed_version(self) -> str:
        """Return the installed version; a Jetson's packages may leave no metadata, then the module itself is asked.

        Raises:
            BackendError: If its module does not import.
        """
        if version := version_of(self.package):
            return version
        try:
            return str(importlib.import_module(self.module).__version__)
        except (ImportError, OSError) as error:
            raise BackendError(f"{self.title} is installed but does not import: {error}.", self.remedy) from None

    def network_arguments(self, version: str) -> dict[str, Any]:
        """Return the keyword arguments of Polygraphy's CreateNetwork for an installed version such as `10.3.0`."""
        return {"strongly_typed": has("asks_for_strong_typing", self.name, version)}

    def config_arguments(self, trt: Any, sm: SM, sparse: bool, options: Options) -> dict[str, Any]:
        """Return the keyword arguments of Polygraphy's CreateConfig or CreateConfigRTX, but for the profiles.

        Precision is in the graph, never in a flag. TF32 is TensorRT's default and TensorRT-RTX's, and Polygraphy would
        turn it off for the first: one numeric contract for both.

        Args:
            trt: The backend's module.
            sm: Compute capability to build for.
            sparse: Whether sparse kernels may be chosen.
            options: Settings of the builder.
        """
        arguments: dict[str, Any] = {
            "sparse_weights": sparse,
            "refittable": options.refit,
            "strip_plan": options.strip,
            "version_compatible": options.version_compatible,
            "builder_optimization_level": options.optimization_level,
            "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        }
        if options.workspace is not None:
            arguments["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace}
        if options.hardware_compatibility != "none":
            level = options.hardware_compatibility.replace("-", "_").upper()
            arguments["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
        return arguments | ({"compute_capabilities": [sm]} if self.rtx else {"tf32": True})

    def more_flags(self, options: Options) -> list[str]:
        """Return builder flags, by name, that Polygraphy has no argument for.

        Args:
            options: Settings of the builder.
        """
        identical = ["REFIT_IDENTICAL"] if options.strip and not options.refit else []  # as trtexec --stripWeights does
        return identical + (["GPU_FALLBACK"] if options.dla is not None else [])


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
            timing_cache=True,
            refused={},
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
            timing_cache=False,
            # as tried with 1.7.1: bytes and settings of the engine with and without each key
            refused={
                "timing_cache": "it measures kernels where the engine runs, and its timing-cache calls do nothing",
                "version_compatible": "its packages have no lean runtime",
                "hardware_compatibility": "its engines fit every GPU of the SM they are built for anyway",
            },
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
