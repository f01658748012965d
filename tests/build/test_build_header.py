from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest

from slope_compile.build.header import check_engine
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.options import Options

A100 = Gpu("NVIDIA A100", (8, 0))


@pytest.fixture
def header(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    module = types.ModuleType("tensorrt")
    module.__spec__ = importlib.machinery.ModuleSpec("tensorrt", None)
    module.__version__ = "10.3.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return {
        "backend": "tensorrt", "version": "10.3.0", "target": "a100", "sm": "8.0", "profile": {}, "onnx_sha256": "0",
        "engine_sha256": "0", "engine_bytes": 1, "sparse_weights": False, "options": Options().as_dict(),
    }  # fmt: skip


def test_the_same_version_and_gpu_pass(header: dict[str, Any]) -> None:
    check_engine(header, A100)


def test_another_version(header: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"built by TensorRT 10\.7\.0, and 10\.3\.0 is installed") as caught:
        check_engine(header | {"version": "10.7.0"}, A100)
    assert "Build it again" in caught.value.remedy


def test_another_gpu(header: dict[str, Any]) -> None:
    with pytest.raises(BackendError, match=r"built for SM 8\.0 \(a100\); the GPU here is RTX 4090 \(SM 8\.9\)"):
        check_engine(header, Gpu("RTX 4090", (8, 9)))


def test_backend_not_installed(header: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")
    monkeypatch.setattr("slope_compile.targets.backends.Backend.installed", lambda self: False)
    with pytest.raises(BackendError, match="TensorRT, which is not installed"):
        check_engine(header, A100)


def test_backend_broken(header: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # importing it now fails
    monkeypatch.setattr("slope_compile.targets.backends.Backend.installed", lambda self: True)
    with pytest.raises(BackendError, match="does not import"):
        check_engine(header, A100)


@pytest.mark.parametrize(("change", "what"), [({"backend": "tvm"}, "names the backend 'tvm'"), ({}, "lacks version")])
def test_not_our_header(header: dict[str, Any], change: dict[str, Any], what: str) -> None:
    if not change:
        del header["version"]
    with pytest.raises(ArtifactError, match=what):
        check_engine(header | change, A100)


@pytest.mark.parametrize(
    ("change", "what"),
    [({"strip": True}, "without its weights"), ({"version_compatible": True}, "brings a runtime of its own")],
)
def test_engines_that_are_not_run_here(header: dict[str, Any], change: dict[str, Any], what: str) -> None:
    with pytest.raises(BackendError, match=what):
        check_engine(header | {"options": header["options"] | change}, A100)


def test_an_engine_for_ampere_and_later_runs_on_ada(header: dict[str, Any]) -> None:
    header["options"]["hardware_compatibility"] = "ampere-plus"
    check_engine(header, Gpu("RTX 4090", (8, 9)))
    with pytest.raises(BackendError, match="built for SM"):
        check_engine(header, Gpu("T4", (7, 5)))


@pytest.mark.parametrize("options", [3, {}, {"strip": True}])
def test_damaged_options(header: dict[str, Any], options: Any) -> None:
    with pytest.raises(ArtifactError, match="names the options"):
        check_engine(header | {"options": options}, A100)
