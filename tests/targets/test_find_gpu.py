from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from slope_compile.targets.gpu import Gpu, find_gpu


def driver(count: int = 1, init: int = 0) -> Any:
    """What libcuda.so.1 does, as far as it is called; the arguments are ctypes references."""

    def assign(reference: Any, value: int) -> int:
        reference._obj.value = value
        return 0

    def name(buffer: Any, size: int, device: Any) -> int:
        buffer.value = b"NVIDIA A100-SXM4-80GB"
        return 0

    return SimpleNamespace(
        cuInit=lambda flags: init,
        cuDeviceGetCount=lambda reference: assign(reference, count),
        cuDeviceGet=lambda reference, index: assign(reference, 7),
        cuDeviceGetName=name,
        cuDeviceGetAttribute=lambda reference, attribute, device: (
            assign(reference, {75: 8, 76: 0}[attribute]) if device.value == 7 else 1
        ),
    )


def test_no_driver() -> None:
    assert find_gpu("libnothing-of-the-kind.so.1") is None


@pytest.mark.parametrize("broken", [driver(count=0), driver(init=100)])
def test_no_device(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: broken)
    assert find_gpu() is None


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver())
    found = find_gpu()
    assert found == Gpu("NVIDIA A100-SXM4-80GB", (8, 0))
    assert str(found) == "NVIDIA A100-SXM4-80GB (SM 8.0)"
