from __future__ import annotations

import ctypes
from typing import Any

import pytest

from slope_compile.build.gpu import Gpu, find_gpu


class Driver:
    """What libcuda.so.1 does, as far as it is called; the arguments are ctypes references."""

    def __init__(self, count: int = 1, init: int = 0) -> None:
        self.count, self.init = count, init

    def cuInit(self, flags: int) -> int:
        return self.init

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 7
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA A100-SXM4-80GB"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 0}[attribute]
        return 0 if device.value == 7 else 1


def test_no_driver() -> None:
    assert find_gpu("libnothing-of-the-kind.so.1") is None


@pytest.mark.parametrize("driver", [Driver(count=0), Driver(init=100)])
def test_no_device(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert find_gpu() is None


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    found = find_gpu()
    assert found == Gpu("NVIDIA A100-SXM4-80GB", (8, 0))
    assert str(found) == "NVIDIA A100-SXM4-80GB (SM 8.0)"
