"""The arms: what each trains with, and the variants that the library itself does not offer.

A variant that won would be in the library; what is here and not there has lost (docs/ablation.md has the figures).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import slope_compile as sc
from slope_compile.compression.lsq import lsq
from slope_compile.compression.slope import Slope

Penalty = Literal["none", "l2", "sr-ste", "cosine", "cosine-ste", "bound"]
GRADUAL = 1 / 3  # of the steps, over which a gradual arm tightens


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune; `bits` None is the dense FP32 network trained as long."""

    name: str
    bits: int | None
    penalty: Penalty = "none"
    strength: float | Literal["auto"] = "auto"
    pattern: str | None = "2:4"
    granularity: Literal["tensor", "channel"] = "tensor"
    masked: bool = False  # pruned weights get no gradient from the task loss
    distillation: float = 0.0  # share of the loss that is KL to the FP32 network's answers
    gradual: Literal["", "pattern", "bits"] = ""
    ramp: Literal["", "up", "down"] = ""  # of the strength, linear over all steps


def main_arms() -> list[Arm]:
    """Return {dense, none, l2, sr-ste, cosine} x {4, 3, 2 bits} x 2:4."""
    penalties: list[Penalty] = ["none", "l2", "sr-ste", "cosine"]
    return [Arm("dense", None), *(Arm(f"{p} W{b}", b, p) for b in (4, 3, 2) for p in penalties)]


def study_arms() -> list[Arm]:
    """Return what the papers leave open, and each ingredient alone, at 2 bits, where effects are largest."""
    none, cosine = Arm("none W2", 2), Arm("cosine W2", 2, "cosine")
    return [
        replace(none, name="none, not sparse W2", pattern=None),
        Arm("none, not sparse W4", 4, pattern=None),
        replace(none, name="none, masked gradient W2", masked=True),
        replace(cosine, name="cosine, masked gradient W2", masked=True),
        replace(cosine, name="cosine through the STE W2", penalty="cosine-ste"),
        replace(cosine, name="bound W2", penalty="bound"),
        Arm("bound W4", 4, "bound"),
        replace(cosine, name="cosine, ramped up W2", ramp="up"),
        replace(cosine, name="cosine, ramped down W2", ramp="down"),
        replace(none, name="none, step per channel W2", granularity="channel"),
        replace(none, name="none, distilled W2", distillation=0.5),
        Arm("none, distilled W4", 4, distillation=0.5),
        replace(none, name="none, gradual pattern W2", gradual="pattern"),
        replace(none, name="none, gradual bits W2", gradual="bits"),
    ]


def tuning_arms() -> list[Arm]:
    """Return each penalty at several strengths, at 2 bits; to be run on seeds that no other arm uses."""
    grid: dict[Penalty, tuple[float, ...]] = {
        "l2": (5e-4, 2e-3, 8e-3),
        "sr-ste": (2e-4, 2e-3, 8e-3),
        "cosine": (0.01, 0.03, 0.1, 0.3, 1.0),
        "bound": (2e-4, 2e-3, 8e-3),
    }
    tried = [Arm(f"{p} {s:g} W2", 2, p, s) for p, strengths in grid.items() for s in strengths]
    return [Arm("none W2", 2), *tried]


class MaskedSlope(Slope):
    """SLOPE's forward pass; the gradient stops at pruned weights."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return q(S(W)), differentiated as q(mask * W)."""
        mask = self.mask(weight)
        return lsq(weight if mask is None else weight * mask, self.step, self.bits)


def compress(model: nn.Module, arm: Arm) -> None:
    """Compress a model in place as an arm says."""
    if arm.bits is None:
        return
    known = arm.penalty if arm.penalty in ("none", "l2", "sr-ste", "cosine") else "none"
    settings: dict[str, Any] = {"pattern": arm.pattern, "granularity": arm.granularity}
    sc.compress(model, bits=arm.bits, regularizer=known, strength=arm.strength, **settings)
    for _, _, slope in compressed(model):
        if arm.masked:
            slope.__class__ = MaskedSlope


def compressed(model: nn.Module) -> Iterator[tuple[str, Any, Slope]]:
    """Yield name, layer and parametrization of every compressed layer."""
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            chain: Any = layer.parametrizations["weight"]
            yield name, layer, chain[0]


def tighten(model: nn.Module, arm: Arm, done: float) -> None:
    """Set pattern or bits of the layers with a pattern to what a gradual arm has at `done` (0 to 1) of its steps."""
    stage = min(int(3 * done / GRADUAL), 3)
    for _, _, slope in compressed(model):
        if slope.pattern is None:
            continue
        if arm.gradual == "pattern":
            slope.pattern = ((4, 4), (3, 4), (2, 4), (2, 4))[stage]
        elif arm.gradual == "bits":
            assert arm.bits is not None
            bits = max((8, 6, 4, arm.bits)[stage], arm.bits)
            # LSQ's initial step goes with 1/sqrt(Qp): keep the learnt range over the change.
            ratio = ((2 ** (slope.bits - 1) - 1) / (2 ** (bits - 1) - 1)) ** 0.5
            slope.step.data.mul_(ratio)
            slope.bits = bits


def penalty(model: nn.Module, arm: Arm, done: float) -> Tensor:
    """Return the arm's penalty, strength included, at `done` (0 to 1) of its steps."""
    if arm.bits is None:
        return torch.zeros(())
    factor = {"": 1.0, "up": 2 * done, "down": 2 * (1 - done)}[arm.ramp]  # the same mean
    if arm.penalty == "cosine-ste":
        strength = 0.1 if arm.strength == "auto" else arm.strength
        return (
            strength * factor * sum(_cosine_distance(layer, through=True).mean() for _, layer, _ in compressed(model))
        )
    if arm.penalty == "bound":
        strength = 2e-3 if arm.strength == "auto" else arm.strength
        return strength * factor * sum(_bound(layer) for _, layer, _ in compressed(model))
    return factor * sc.penalty(model)


def _cosine_distance(layer: Any, through: bool) -> Tensor:
    w = layer.parametrizations["weight"].original
    w_hat = layer.weight if through else layer.weight.detach()
    return 1 - F.cosine_similarity(w.flatten(1), w_hat.flatten(1), dim=1)  # [K]


def _bound(layer: Any) -> Tensor:
    """SLOPE's bound on the error, 2‖w‖²(1 - cos), with ‖w‖² held fixed: one decay rate in all layers and filters."""
    norm = layer.parametrizations["weight"].original.detach().flatten(1).square().sum(dim=1)  # [K]
    return (norm * _cosine_distance(layer, through=False)).sum()
