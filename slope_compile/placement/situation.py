"""For whom a model is placed: everything that the choice of a placement may depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from slope_compile.recipe import BuildSection, Placement
from slope_compile.targets.backends import Backend
from slope_compile.targets.target import Target


@dataclass(frozen=True)
class Situation:
    """A target, and who builds for it.

    Args:
        target: The GPU.
        backend: Who builds.
        version: The backend's version, such as `10.3.0`: the installed one, or the one expected on the device.
        precision: Type of the activations that are not quantized.
        batch: The opt shape's batch.
        overrides: Layer-name pattern -> placement, from the recipe; the last pattern that fits a layer wins.
        precision_reason: Why the precision is that one.
    """

    target: Target
    backend: Backend
    version: str
    precision: Literal["fp32", "fp16", "bf16"]
    batch: int
    overrides: Mapping[str, Placement] = field(default_factory=dict)
    precision_reason: str = ""


def situation_of(section: BuildSection, target: Target, backend: Backend, version: str, model: Path) -> Situation:
    """Return for whom a model is placed, with the precision and the batch that the recipe leaves open.

    Args:
        section: How to build.
        target: The GPU.
        backend: Who builds.
        version: The backend's version: the installed one, or the one expected on the device.
        model: The exported ONNX file.

    Raises:
        BackendError: If the precision asked for is not to be had there.
        ArtifactError: If the model cannot be read.
    """
    from slope_compile.placement.passes.precision import resolve_precision  # onnx_ir: a second, and not on a device

    precision, reason = resolve_precision(model, section.precision, target, backend)
    batch = section.batch.resolved(target.opt_batch)[1]
    return Situation(target, backend, version, precision, batch, section.placement, reason)
