from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import types

import pytest
from strict_trt import StrictModule, fixture

from slope_compile.errors import BackendError
from slope_compile.recipe import BatchRange, BuildSection
from slope_compile.targets import backends
from slope_compile.targets.backends import BACKENDS, backend_version, choose_backend
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.options import Options

A100 = Gpu("A100", (8, 0))
TENSORRT, RTX = BACKENDS["tensorrt"], BACKENDS["tensorrt-rtx"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    modules: set[str] = set()
    monkeypatch.setattr(backends.Backend, "installed", lambda self: self.module in modules)
    return modules


def test_auto(installed: set[str]) -> None:
    installed |= {"tensorrt", "tensorrt_rtx"}
    assert choose_backend("auto", A100) is TENSORRT
    assert choose_backend("auto", None) is RTX  # TensorRT cannot build without a GPU
    installed.remove("tensorrt")
    assert choose_backend("auto", A100) is RTX


def test_nothing_installed(installed: set[str]) -> None:
    for name in ("auto", "tensorrt-rtx"):
        with pytest.raises(BackendError, match=r"pip install 'slope-compile\[rtx\]'"):
            choose_backend(name, A100)
    with pytest.raises(BackendError, match=r"pip install 'slope-compile\[tensorrt\]'"):
        choose_backend("tensorrt", A100)
    installed.add("tensorrt")
    with pytest.raises(BackendError, match="neither TensorRT with a GPU nor TensorRT-RTX"):
        choose_backend("auto", None)


def test_misspelt() -> None:
    with pytest.raises(BackendError, match="Did you mean 'tensorrt-rtx'"):
        choose_backend("tensorrt_rtx", None)


def test_arguments() -> None:
    trt = StrictModule(fixture("tensorrt-10.3.0"))
    everything = Options(
        workspace=1 << 20, optimization_level=1, version_compatible=True, hardware_compatibility="ampere-plus",
        refit=True, strip=True, dla=0,
    )  # fmt: skip
    plain = {
        "refittable": False, "strip_plan": False, "version_compatible": False, "builder_optimization_level": None,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }  # fmt: skip
    assert TENSORRT.config_arguments(trt, (8, 0), True, Options()) == plain | {"sparse_weights": True, "tf32": True}
    assert RTX.config_arguments(trt, (8, 6), False, Options()) == plain | {
        "sparse_weights": False,
        "compute_capabilities": [(8, 6)],
    }
    assert TENSORRT.config_arguments(trt, (8, 0), False, everything) == {
        "sparse_weights": False, "tf32": True, "refittable": True, "strip_plan": True, "version_compatible": True,
        "builder_optimization_level": 1, "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
        "memory_pool_limits": {trt.MemoryPoolType.WORKSPACE: 1 << 20},
        "hardware_compatibility_level": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }  # fmt: skip
    assert TENSORRT.more_flags(everything) == ["GPU_FALLBACK"]
    assert TENSORRT.more_flags(Options(strip=True)) == ["REFIT_IDENTICAL"]
    for version, flag in (("10.3.0", True), ("10.16.1.11", True), ("11.0.0", False), ("11.4.0.106", False)):
        assert TENSORRT.network_arguments(version) == {"strongly_typed": flag}
    assert RTX.network_arguments("1.7.1.116") == {"strongly_typed": False}


def test_options_of_a_recipe() -> None:
    section = BuildSection(workspace_gib=0.5, optimization_level=2, refit=True, dla=1, batch=BatchRange(max=2))
    assert Options.of(section) == Options(workspace=2**29, optimization_level=2, refit=True, dla=1)


def test_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RTX.installed_version().startswith("1.")
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)  # a Jetson's packages may leave no metadata
    assert TENSORRT.installed_version() == "10.3.0"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match="does not import"):
        TENSORRT.installed_version()


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("POLYGRAPHY_USE_TENSORRT_RTX", None)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_polygraphy_knows_the_arguments() -> None:
    code = """
import inspect, json
from polygraphy.backend.trt import CreateConfig, CreateNetwork
from polygraphy.backend.trt.config import _CreateConfigCommon
names = [name for kind in (CreateConfig, _CreateConfigCommon) for name in inspect.signature(kind.__init__).parameters]
print(json.dumps([names, list(inspect.signature(CreateNetwork.__init__).parameters)]))
"""
    config, network = json.loads(run_python(code).stdout)
    trt = StrictModule(fixture("tensorrt-10.3.0"))
    arguments = TENSORRT.config_arguments(trt, (8, 0), True, Options(workspace=1, hardware_compatibility="ampere-plus"))
    assert {*arguments, "profiles"} <= set(config)
    assert set(TENSORRT.network_arguments("10.3")) <= set(network)


def test_selecting_leaves_the_environment_and_refuses_the_other() -> None:
    code = """
import os
from slope_compile.targets.backends import BACKENDS, select_in_polygraphy
from slope_compile.errors import BackendError
trt = select_in_polygraphy(BACKENDS["tensorrt-rtx"])
assert trt.__name__ == "tensorrt_rtx", trt
assert "POLYGRAPHY_USE_TENSORRT_RTX" not in os.environ
assert select_in_polygraphy(BACKENDS["tensorrt-rtx"]) is trt
try:
    select_in_polygraphy(BACKENDS["tensorrt"])
except BackendError as error:
    print(error.problem)
"""
    done = run_python(code)
    assert "already works with TensorRT-RTX" in done.stdout, done.stderr


def test_version(installed: set[str]) -> None:
    assert backend_version("tensorrt-rtx") == "none"
    installed.add("tensorrt_rtx")
    name, _, version = backend_version("tensorrt-rtx").partition(" ")
    assert name == "tensorrt-rtx"
    assert version.startswith("1.")


def test_every_difference_is_in_the_table() -> None:
    """A new field must be given for both backends: no default hides a difference."""
    fields = inspect.signature(backends.Backend).parameters.values()
    assert all(field.default is inspect.Parameter.empty for field in fields)
