"""The GPUs that an engine can be built for, by the name that a recipe uses.

* a100: server, SM 8.0
* rtx-turing, rtx-ampere, rtx-ada, rtx-blackwell: workstation cards, SM 7.5, 8.6, 8.9, 12.0
* gb10: DGX Spark, SM 12.1
* orin, thor: Jetson, SM 8.7 and 11.0, only on the device itself
"""

from __future__ import annotations

from dataclasses import dataclass

from slope_compile.errors import BackendError, nearest


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Args:
        name: As in a recipe and in `--target`.
        sm: Compute capability, (major, minor).
        devices: What a person calls it.
        on_device: Whether the engine must be built on the device, because NVIDIA supports nothing else for it.
        opt_batch: The batch that the device usually serves, in images.
    """

    name: str
    sm: tuple[int, int]
    devices: str
    on_device: bool = False
    opt_batch: int = 16

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm[0]}.{self.sm[1]}, {self.devices})"


TARGETS = {
    target.name: target
    for target in (
        Target("a100", (8, 0), "A100, A30"),
        Target("rtx-turing", (7, 5), "RTX 20, T4"),
        Target("rtx-ampere", (8, 6), "RTX 30, A10, A40"),
        Target("rtx-ada", (8, 9), "RTX 40, L4, L40"),
        Target("rtx-blackwell", (12, 0), "RTX 50, RTX PRO Blackwell"),
        Target("gb10", (12, 1), "DGX Spark"),
        Target("orin", (8, 7), "Jetson Orin", on_device=True),
        Target("thor", (11, 0), "Jetson Thor", on_device=True),
    )
}


def find_target(name: str) -> Target:
    """Return the target of that name.

    Raises:
        BackendError: If there is none; the remedy names the nearest.
    """
    if name not in TARGETS:
        raise BackendError(f"There is no target '{name}'.", nearest(name, TARGETS))
    return TARGETS[name]
