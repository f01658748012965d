"""What `doctor` tells: of backends that work, that do not import, that die; of drivers, boards and folders."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slope_compile import health
from slope_compile.health import Driver, Health, board, cuda_driver, examine
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.target import TARGETS

ORIN = Gpu("Orin", (8, 7))


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets `tensorrt` be a module of the given text, on a machine with the given GPU; then examines."""

    def install(text: str, gpu: Gpu | None = None) -> Health:
        (tmp_path / "tensorrt.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(health, "find_gpu", lambda: gpu)
        monkeypatch.setattr(health, "NATIVE", {"tensorrt": "tensorrt", "tensorrt-rtx": "json"})
        monkeypatch.setattr(health, "_RUNTIME", "")
        return examine(tmp_path)

    return install


def test_it_imports_nothing_big_itself() -> None:
    code = (
        "import sys; from pathlib import Path; from slope_compile.health import examine; examine(Path()); "
        "print({'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'polygraphy'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_backend_without_metadata_is_asked_for_its_version(tensorrt: Any) -> None:
    found = tensorrt("__version__ = '10.3.0'", ORIN)
    assert found.problems == ()
    assert found.backends["tensorrt"] == "10.3.0"
    assert found.builders("orin") == found.builders("orin-nano") == ["tensorrt"]
    assert [target.name for target in found.targets_of_gpu()] == ["orin", "orin-nano"]
    assert "builds only for the GPU of its machine" in found.refusals["a100"]["tensorrt"]
    assert set(found.refusals) == set(TARGETS)


def test_a_tensorrt_that_does_not_run_there_is_told(tensorrt: Any) -> None:
    found = tensorrt("__version__ = '11.0.0'", ORIN)
    assert found.builders("orin") == []
    assert "TensorRT 11.0.0 does not run on orin" in found.refusals["orin"]["tensorrt"]


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("raise ImportError('libnvdla_compiler.so: cannot open shared object file')", "libnvdla", "--runtime nvidia"),
        ("raise OSError('libnvinfer.so.10: file too short')", "libnvinfer.so.10: file too short", "from where it came"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11", "from where it came"),
        ("import os; os._exit(3)", "exit code 3", "from where it came"),
    ],
)
def test_a_backend_that_does_not_import_is_broken(tensorrt: Any, text: str, what: str, remedy: str) -> None:
    found = tensorrt(text, ORIN)
    (problem,) = found.problems
    assert problem.what.startswith("tensorrt is installed but does not import: ")
    assert what in problem.what and remedy in problem.remedy
    assert "tensorrt" not in found.backends
    assert found.refusals["orin"]["tensorrt"] == "TensorRT is installed but does not import."


def test_an_import_that_hangs_is_ended(tensorrt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "IMPORT_LIMIT", 0.0)
    assert any("it took more than 0 s" in problem.what for problem in tensorrt("import time; time.sleep(60)").problems)


def test_without_a_backend_nothing_is_built_and_nothing_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "NATIVE", {})
    monkeypatch.setattr(health.Backend, "installed", lambda _: False)
    monkeypatch.setattr(health.os, "access", lambda *_: False)
    found = examine(tmp_path)
    assert not found.problems and not found.backends and not found.writable and found.free_bytes > 0
    assert set(found.refusals["a100"].values()) == {"TensorRT is not installed.", "TensorRT-RTX is not installed."}


class Cuda:
    """A driver's library whose cuInit gives a code."""

    def __init__(self, code: int) -> None:
        self.code = code

    def cuInit(self, _: int) -> int:  # noqa: N802
        return self.code

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802
        number._obj.value = 12060
        return 0


@pytest.mark.parametrize(("code", "error"), [(0, 0), (100, 0), (34, 0), (803, 803)])
def test_only_a_driver_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch, code: int, error: int) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Cuda(code))
    assert cuda_driver() == Driver(loads=True, cuda="12.6", error=error)


def test_no_driver() -> None:
    assert cuda_driver("libnothere.so.1") == Driver(loads=False)


def test_a_driver_that_fails_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "NATIVE", {})
    monkeypatch.setattr(health, "cuda_driver", lambda: Driver(loads=True, cuda="12.6", error=803))
    (problem,) = examine(tmp_path).problems
    assert "803" in problem.what


def test_a_board_is_told_by_its_own_files(tmp_path: Path) -> None:
    assert board(tmp_path) == ""
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson AGX Orin Developer Kit\0")
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    assert board(tmp_path) == "NVIDIA Jetson AGX Orin Developer Kit, L4T 36.4.3"
    (tmp_path / "proc/device-tree/model").write_bytes(b"Raspberry Pi 5\0")
    (tmp_path / "etc/nv_tegra_release").write_bytes(b"\xff nothing known")
    assert board(tmp_path) == ""
