"""The GPU of this machine, asked of the driver itself: no torch, no nvidia-smi (a Jetson's does not tell)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

# CUdevice_attribute in cuda.h
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76
NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU that CUDA shows to this process.

    Args:
        name: As the driver calls it.
        sm: Compute capability, (major, minor).
    """

    name: str
    sm: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm[0]}.{self.sm[1]})"


def find_gpu(library: str = "libcuda.so.1") -> Gpu | None:
    """Return the GPU that TensorRT would use here, or None where there is no driver or no device.

    Args:
        library: The CUDA driver's library.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return None
    device, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
        return None
    name, major, minor = ctypes.create_string_buffer(NAME_BYTES), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetName(name, NAME_BYTES, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, device)
    )
    return None if failed else Gpu(name.value.decode(errors="replace"), (major.value, minor.value))
