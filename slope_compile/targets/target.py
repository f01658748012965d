"""The GPUs that an engine can be built for, by the name that a recipe uses; targets.yaml holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from slope_compile.errors import BackendError, nearest
from slope_compile.targets.versions import parse_version

SM = tuple[int, int]
Amount = Annotated[float, Field(gt=0)]


class Checked(BaseModel):
    """A part of targets.yaml: unknown keys refused, values immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class TensorRTRange(Checked):
    """TensorRTs that run on a target, under one system such as a JetPack."""

    system: str
    first: Annotated[str, Field(alias="from")]
    below: str

    def holds(self, version: str) -> bool:
        """Whether a version such as `10.3.0.26` is one of them."""
        return parse_version(self.first) <= parse_version(version) < parse_version(self.below)


class Target(Checked):
    """A kind of GPU.

    Args:
        name: As in a recipe and in `--target`.
        sm: Compute capability, (major, minor).
        devices: What a person calls it.
        figures_of: The device whose peaks are given.
        memory_gib: Memory of the largest device of this kind, GiB.
        bandwidth_gbs: Memory bandwidth, GB/s.
        tflops: `fp32` (TF32 where there is), `fp16`, `int8` -> published dense peak, TFLOPS or TOPS.
        sparse_speedup: Peak with 2:4 sparsity over the dense one; 1.0: the GPU has no sparse tensor cores.
        types: ONNX types that TensorRT computes with or holds there.
        dla_cores: Deep-learning accelerators beside the GPU.
        opt_batch: The batch that the device usually serves, in images.
        on_device: Whether the engine must be built on the device, because NVIDIA supports nothing else for it.
        container: Image in which engines are built for it.
        tensorrt: Which TensorRTs run there.
        rtx: Whether TensorRT-RTX `runs` there by its support matrix, only `builds` for it, or has `no` code for it.
    """

    name: str
    sm: SM
    devices: str
    figures_of: str
    memory_gib: Amount
    bandwidth_gbs: Amount
    tflops: Mapping[Literal["fp32", "fp16", "int8"], Amount]
    sparse_speedup: Annotated[float, Field(ge=1)]
    types: frozenset[str]
    dla_cores: Annotated[int, Field(ge=0)]
    opt_batch: Annotated[int, Field(ge=1)]
    on_device: bool
    container: str
    tensorrt: tuple[TensorRTRange, ...]
    rtx: Literal["runs", "builds", "no"]

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm[0]}.{self.sm[1]}, {self.devices})"

    def system_of(self, version: str) -> str | None:
        """Return the system under which that TensorRT runs on the target, None where none does."""
        return next((row.system for row in self.tensorrt if row.holds(version)), None)


class _Targets(Mapping[str, Target]):
    """The targets by name, read when first asked for."""

    def __getitem__(self, name: str) -> Target:
        return _read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_read())

    def __len__(self) -> int:
        return len(_read())


TARGETS: Mapping[str, Target] = _Targets()


def find_target(name: str) -> Target:
    """Return the target of that name.

    Raises:
        BackendError: If there is none; the remedy names the nearest.
    """
    if name not in TARGETS:
        raise BackendError(f"There is no target '{name}'.", nearest(name.lower(), TARGETS))
    return TARGETS[name]


@cache
def _read() -> dict[str, Target]:
    text = (resources.files("slope_compile.targets") / "targets.yaml").read_text(encoding="utf-8")
    rows: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {name: Target(name=name, **row) for name, row in rows.items()}
