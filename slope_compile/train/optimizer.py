"""Optimizers, what they decay, and the learning rate of each step."""

from __future__ import annotations

import math

from torch import nn, optim

from slope_compile.recipe import TrainSection

STEP_SUFFIX = ".step"  # the quantizers' learned steps: …parametrizations.weight.0.step


def make_optimizer(model: nn.Module, section: TrainSection) -> optim.Optimizer:
    """Return SGD with Nesterov momentum, or AdamW; the learning rate is set at each step.

    Weight decay spares steps, biases, norms, and what the model itself exempts (timm's `no_weight_decay`).
    """
    decayed, spared = split_parameters(model)
    groups = [{"params": decayed, "weight_decay": section.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    if section.optimizer == "adamw":
        return optim.AdamW(groups, lr=section.lr, fused=True)
    return optim.SGD(groups, lr=section.lr, momentum=section.momentum, nesterov=section.momentum > 0, fused=True)


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that weight decay acts on, and those it spares."""
    exempt = set(getattr(model, "no_weight_decay", set)())
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
        for parameter in module.parameters(recurse=False)
    }
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        spare = parameter.ndim < 2 or id(parameter) in norms or name in exempt or name.endswith(STEP_SUFFIX)
        (spared if spare else decayed).append(parameter)
    return decayed, spared


def lr_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate of step 0 <= step < steps: linear warm-up to `peak`, then a cosine that ends above 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))
