"""Addresses that repeat, for a library that orders some of what it writes by them.

TensorRT keeps things in containers ordered by pointer. Where its heap begins, and what else lies on it, then decides
names and order in the engine. What a Python process has on its heap before depends on the length of paths and on the
files in the folders that it imports from. So the library is loaded, and used, in a thread: glibc gives each thread a
heap of its own, and `place_below` decides where.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import sys
from pathlib import Path

# No cache of freed blocks, which would hand the thread blocks of another heap; and a threshold that stays as it is.
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mmap_threshold=131072"
LIBRARIES, USE = 0x7000_0000_0000, 0x6000_0000_0000  # far below what Linux maps first, far above the first heap
_FIXED_NOREPLACE, _NORESERVE = 0x100000, 0x4000
_NOT_FOR_MAPPING = ("[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")


def place_below(floor: int) -> None:
    """Take all free address space from `floor` up, so that Linux maps whatever comes next right below it.

    Nothing is allocated: the pages are neither readable nor writable. Where that is forbidden (a limit on address
    space), addresses stay as they are.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED_NOREPLACE | _NORESERVE
    end = floor
    for start, stop in _mappings():
        if start > end:
            libc.mmap(end, start - end, 0, flags, -1, 0)
        end = max(end, stop)


def load_libraries(package: str) -> None:
    """Load every library of a package of libraries, in the order of their names; none, if there is no such package."""
    found = importlib.util.find_spec(package)
    for folder in (found.submodule_search_locations or []) if found else []:
        for library in sorted(Path(folder).glob("*.so*")):
            with contextlib.suppress(OSError):  # the package itself tells what is missing, when it is imported
                ctypes.CDLL(str(library))


def _mappings() -> list[tuple[int, int]]:
    """Return (start, end) of what is mapped where Linux chooses the place, lowest first."""
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, *_, name = [*line.split(maxsplit=5), ""][:6]
        if name not in _NOT_FOR_MAPPING:
            start, stop = (int(part, 16) for part in span.split("-"))
            found.append((start, stop))
    return found
