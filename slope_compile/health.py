"""Whether what is installed here works, and what can be built here: what `doctor` tells.

Packages with native libraries are imported in processes of their own: one that dies, or takes its time, does not take
`doctor` with it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slope_compile.child import LAST_WORDS, command_of
from slope_compile.errors import BackendError
from slope_compile.machine import version_of
from slope_compile.recipe import BuildSection
from slope_compile.targets.backends import BACKENDS, Backend
from slope_compile.targets.gpu import Gpu, find_gpu
from slope_compile.targets.refusals import require_buildable
from slope_compile.targets.target import TARGETS, Target

IMPORT_LIMIT = 45.0  # seconds for all imports; an image's health check has 60
NO_DEVICE = frozenset({34, 100})  # cuInit: the library is the toolkit's stub; there is no GPU
# package -> module
NATIVE = {"onnx": "onnx", "onnxruntime": "onnxruntime"} | {b.package: b.module for b in BACKENDS.values()}
_IMPORT = "import {0}; print({0}.__version__)"
# Polygraphy runs engines through the CUDA runtime, which it looks for in more places than the loader does.
_RUNTIME = "from polygraphy import cuda; cuda.wrapper()"


@dataclass(frozen=True)
class Problem:
    """Something installed that does not work, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Driver:
    """The CUDA driver.

    Args:
        loads: Whether its library loads.
        cuda: The CUDA version that it speaks, such as `12.6`; empty: unknown.
        error: cuInit's code, where that is no plain absence of a GPU; 0: none.
    """

    loads: bool
    cuda: str = ""
    error: int = 0


@dataclass(frozen=True)
class Health:
    """What is here, and what it is good for.

    Args:
        board: A Jetson's name and its L4T release; empty elsewhere.
        gpu: The GPU that engines would be built for.
        driver: The CUDA driver.
        runtime: Whether the CUDA runtime loads that engines are run through.
        backends: Name -> version of each installed backend that imports.
        refusals: Target -> backend -> why it cannot build for it here; empty: it can.
        folder: The working folder.
        free_bytes: Space left there.
        writable: Whether this user may write there.
        problems: What is installed and broken.
    """

    board: str
    gpu: Gpu | None
    driver: Driver
    runtime: bool
    backends: Mapping[str, str]
    refusals: Mapping[str, Mapping[str, str]]
    folder: Path
    free_bytes: int
    writable: bool
    problems: tuple[Problem, ...]

    def builders(self, target: str) -> list[str]:
        """Return the backends that can build for a target here."""
        return [name for name, refusal in self.refusals[target].items() if not refusal]

    def targets_of_gpu(self) -> list[Target]:
        """Return the targets that the GPU here may be: some share a compute capability."""
        return [target for target in TARGETS.values() if self.gpu is not None and target.sm == self.gpu.sm]


def examine(folder: Path) -> Health:
    """Import what build and verify need, ask the driver, and match both with the targets.

    Args:
        folder: Where the user works.
    """
    gpu, driver = find_gpu(), cuda_driver()
    versions, problems, runtime = _imports()
    backends = {name: versions[backend.package] for name, backend in BACKENDS.items() if backend.package in versions}
    broken = {backend.name for backend in BACKENDS.values() if backend.installed()} - set(backends)
    if driver.error:
        what = f"The CUDA driver's library is here, but cuInit fails with error {driver.error}."
        problems.append(Problem(what, "Reboot after an update of the driver; on a Jetson, be in the group video."))
    return Health(
        board=board(),
        gpu=gpu,
        driver=driver,
        runtime=runtime,
        backends=backends,
        refusals={target.name: _refusals(target, backends, broken, gpu) for target in TARGETS.values()},
        folder=folder,
        free_bytes=shutil.disk_usage(folder).free,
        writable=os.access(folder, os.W_OK),
        problems=tuple(problems),
    )


def cuda_driver(library: str = "libcuda.so.1") -> Driver:
    """Load and start the CUDA driver.

    Args:
        library: Its library.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return Driver(loads=False)
    code, number = int(cuda.cuInit(0)), ctypes.c_int()
    known = cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value > 0
    version = f"{number.value // 1000}.{number.value % 1000 // 10}" if known else ""
    return Driver(loads=True, cuda=version, error=0 if code in NO_DEVICE else code)


def board(root: Path = Path("/")) -> str:
    """Return a Jetson's name and L4T release as its own files tell them; empty elsewhere.

    Args:
        root: The root of the file system.
    """
    parts = []
    model, release = root / "proc/device-tree/model", root / "etc/nv_tegra_release"
    if model.is_file():
        name = model.read_bytes().rstrip(b"\0").decode(errors="replace")
        parts += [name] if "NVIDIA" in name else []
    if release.is_file():
        found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", release.read_text(errors="replace"))
        parts += [f"L4T {found[1]}.{found[2]}"] if found else []
    return ", ".join(parts)


def _imports() -> tuple[dict[str, str], list[Problem], bool]:
    """Return package -> version of what imports, what does not, and whether the CUDA runtime loads."""
    here = {package: module for package, module in NATIVE.items() if importlib.util.find_spec(module) is not None}
    deadline = time.monotonic() + IMPORT_LIMIT
    running = {package: _start(_IMPORT.format(module)) for package, module in here.items()}
    runtime = _start(_RUNTIME)
    versions, problems = {}, []
    for package, process in running.items():
        done, out, err = _end(process, deadline)
        if done:
            versions[package] = version_of(package) or out
        else:
            what = f"{package} {version_of(package) or ''}".rstrip()
            problems.append(Problem(f"{what} is installed but does not import: {err}.", _remedy(package, err)))
    return versions, problems, _end(runtime, deadline)[0]


def _start(code: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command_of(code), stdout=pipe, stderr=pipe, text=True, errors="replace")


def _end(process: subprocess.Popen[str], deadline: float) -> tuple[bool, str, str]:
    """Return whether a process ended well, and the last line of each of its streams."""
    try:
        out, err = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, "", f"it took more than {IMPORT_LIMIT:.0f} s"
    code = process.returncode
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    return code == 0, _last_line(out), (_last_line(err) if code > 0 else "") or ended


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:LAST_WORDS].rstrip(".") if lines else ""


def _remedy(package: str, said: str) -> str:
    if "libnvdla" in said:
        return "A Jetson's container gets that library from its host: start it with `--runtime nvidia`."
    return f"Reinstall {package} from where it came: pip, or the packages of JetPack or of the image."


def _refusals(target: Target, versions: Mapping[str, str], broken: set[str], gpu: Gpu | None) -> dict[str, str]:
    return {
        name: _refusal(target, backend, versions.get(name), name in broken, gpu) for name, backend in BACKENDS.items()
    }


def _refusal(target: Target, backend: Backend, version: str | None, broken: bool, gpu: Gpu | None) -> str:
    """Return why a backend cannot build for a target here; empty: it can."""
    if version is None:
        return f"{backend.title} is installed but does not import." if broken else f"{backend.title} is not installed."
    try:
        require_buildable(BuildSection(), target, backend, version, gpu)
    except BackendError as error:
        return str(error)
    return ""
