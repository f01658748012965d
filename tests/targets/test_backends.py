from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest

from slope_compile.errors import BackendError
from slope_compile.targets import backends
from slope_compile.targets.backends import BACKENDS, backend_version, choose_backend, require_buildable
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.target import find_target

A100, RTX_4090 = Gpu("A100", (8, 0)), Gpu("RTX 4090", (8, 9))
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


@pytest.mark.parametrize("target", ["a100", "rtx-turing", "rtx-ampere", "rtx-ada", "rtx-blackwell", "gb10"])
def test_rtx_builds_ahead_of_time(target: str) -> None:
    require_buildable(RTX, find_target(target), None)


@pytest.mark.parametrize(("target", "sm"), [("orin", "8.7"), ("thor", "11.0")])
def test_rtx_has_no_jetson(target: str, sm: str) -> None:
    with pytest.raises(BackendError, match=f"no code generator for SM {sm}") as caught:
        require_buildable(RTX, find_target(target), None)
    assert "on the Jetson" in caught.value.remedy
    assert "later release" in caught.value.remedy


def test_tensorrt_builds_for_the_gpu_that_is_here() -> None:
    require_buildable(TENSORRT, find_target("a100"), A100)
    require_buildable(TENSORRT, find_target("orin"), Gpu("Orin", (8, 7)))
    with pytest.raises(BackendError, match=r"which is RTX 4090 \(SM 8.9\), not a100 \(SM 8.0") as caught:
        require_buildable(TENSORRT, find_target("a100"), RTX_4090)
    assert "tensorrt-rtx" in caught.value.remedy
    with pytest.raises(BackendError, match="there is none here") as caught:
        require_buildable(TENSORRT, find_target("thor"), None)
    assert "tensorrt-rtx" not in caught.value.remedy  # it has no SM 11.0 either


def test_arguments() -> None:
    assert TENSORRT.config_arguments((8, 0), True) == {"sparse_weights": True, "tf32": True}
    assert RTX.config_arguments((8, 6), False) == {"sparse_weights": False, "compute_capabilities": [(8, 6)]}
    for version, flag in (("10.3.0", True), ("10.16.1.11", True), ("11.0.0", False), ("11.4.0.106", False)):
        assert TENSORRT.network_arguments(version) == {"strongly_typed": flag}
    assert RTX.network_arguments("1.7.1.116") == {"strongly_typed": False}


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
    assert {*TENSORRT.config_arguments((8, 0), True), "profiles"} <= set(config)
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
