"""One optimizer step on one global batch, however many ranks and parts share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn, optim
from torch.nn.utils import parametrize

from slope_compile.train.engine import over_ranks
from slope_compile.train.tasks import Batch, Task

Penalty = Callable[[nn.Module], Tensor]


class Stepper:
    """Takes optimizer steps.

    With N items in the batch, split into R ranks' shares and each share into parts of n items, the step follows the
    gradient of sum(n/N * loss(part)) + penalty: that of the unsplit batch wherever a loss is a mean over items.

    Args:
        accelerator: Of this process.
        task: Whose loss.
        model: The model itself, for the penalty.
        prepared: What `accelerator.prepare` made of it: it averages the ranks' gradients.
        optimizer: Of the model's parameters.
        penalty: Added once a step; None: nothing is.
        parts: How many parts each share is split into.
        compiled: Whether forward passes go through torch.compile.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        model: nn.Module,
        prepared: nn.Module,
        optimizer: optim.Optimizer,
        penalty: Penalty | None,
        parts: int,
        compiled: bool,
    ) -> None:
        self.accelerator, self.task, self.model, self.prepared = accelerator, task, model, prepared
        self.optimizer, self.penalty, self.parts, self.compiled = optimizer, penalty, parts, compiled
        self.run: nn.Module = torch.compile(prepared) if compiled else prepared  # type: ignore[assignment]

    def take(self, batch: Batch, items: int, lr: float) -> tuple[float, float]:
        """Take one step, unless loss or penalty is not finite.

        Args:
            batch: This rank's share, on its device.
            items: Size of the global batch, N.
            lr: Learning rate.

        Returns:
            Loss (mean over the global batch) and penalty, the same on every rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        parts = batch.split(self.parts) if self.parts > 1 else [batch]
        losses = [self._backward(part, items, last=part is parts[-1]) for part in parts]
        # Every rank must judge alike: one that stops alone leaves the others waiting.
        loss, term = over_ranks(self.accelerator, [sum(loss for loss, _ in losses), losses[-1][1]])
        term /= self.accelerator.num_processes
        if math.isfinite(loss + term):
            self.optimizer.step()
        return loss, term

    def _backward(self, part: Batch, items: int, last: bool) -> tuple[float, float]:
        """Add a part's gradient, after the last one the penalty's; return n/N * loss and the penalty."""
        share, ranks = len(part) / items, self.accelerator.num_processes
        # Only the last part's backward pass sums up over the ranks, for all parts.
        alone = nullcontext() if last else self.accelerator.no_sync(self.prepared)
        # Forward pass and penalty share each compressed weight; the cache ends before the weights change.
        with alone, parametrize.cached():
            if self.compiled:
                _compute_weights(self.model)
            loss = self.task.loss(self.run, part) * share
            term = self.penalty(self.model) if last and self.penalty else torch.zeros_like(loss)
            # DDP divides the sum over ranks by their number.
            self.accelerator.backward(loss * ranks + term)
        return float(loss.detach()), float(term.detach())


def _compute_weights(model: nn.Module) -> None:
    """Fill parametrize's cache, so that the compiler finds finished weights and not how they come about."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for name in cast("nn.ModuleDict", module.parametrizations):
                getattr(module, name)
