"""Each in a process of its own: address space that is taken stays taken."""

from __future__ import annotations

import subprocess
import sys

import pytest

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="it reads Linux's list of mappings")


def told(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@LINUX
@pytest.mark.parametrize("before", [0, 1, 57])
def test_what_is_mapped_next_lies_right_below(before: int) -> None:
    """Whatever was mapped before, the next 64 MiB are at the same address."""
    code = f"""
import ctypes, mmap
from slope_compile.build.addresses import USE, place_below
held = [mmap.mmap(-1, (k + 1) << 20) for k in range({before})]
place_below(USE)
new = mmap.mmap(-1, 64 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(new))
print(USE - (64 << 20) - address)
"""
    assert 0 <= int(told(code)) < 4 << 20  # Python may map a megabyte of its own first


@LINUX
def test_the_stack_can_still_grow() -> None:
    code = """
import sys
from slope_compile.build.addresses import LIBRARIES, USE, place_below
place_below(LIBRARIES); place_below(USE)
def deep(n): return n and sorted([n], key=lambda _: deep(n - 1)) and 1
sys.setrecursionlimit(9000)
print(deep(1000))
"""
    assert told(code) == "1"


def test_a_package_that_is_not_there_is_no_error() -> None:
    assert (
        told("from slope_compile.build.addresses import load_libraries; print(load_libraries('no_such_libs'))")
        == "None"
    )
