"""SLOPE: sparsify, quantize, align. Ŵ = q(S(W; n, m); s, b), https://arxiv.org/abs/2511.08360.

W is the latent that the optimizer moves, S the N:M mask recomputed at every step, q the LSQ quantizer. Gradients go
straight through S: a pruned weight gets the full gradient of its place in Ŵ, so that it can come back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slope_compile.compression.codes import CodedTensor
from slope_compile.compression.lsq import (
    Granularity,
    along_channels,
    bounds,
    effective_step,
    gradients,
    levels,
    step_init,
)
from slope_compile.compression.regularizer import Regularizer, cosine_distance, pruned_decay, squared_error
from slope_compile.compression.sparsity import keep_largest, nm_mask


class Slope(nn.Module):
    """The parametrization W -> Ŵ of one layer's weight, for `torch.nn.utils.parametrize`.

    Args:
        weight: The dense weight, float32 (K, C, ...), from which the step is initialized.
        bits: 2 to 8.
        pattern: (n, m) along axis 1, or None for dense.
        granularity: One step per tensor or per output channel.
        regularizer: What `penalty` measures.
        strength: What it is multiplied with.
    """

    def __init__(
        self,
        weight: Tensor,
        bits: int,
        pattern: tuple[int, int] | None,
        granularity: Granularity = "tensor",
        regularizer: Regularizer = "none",
        strength: float = 0.0,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.pattern = pattern
        self.granularity = granularity
        self.regularizer = regularizer
        self.strength = strength
        self.step = nn.Parameter(step_init(weight, bits, granularity))  # scalar or [K]

    def forward(self, weight: Tensor) -> Tensor:
        """Return Ŵ, the shape and type of `weight`."""
        compressed: Tensor = _SlopeFunction.apply(weight, self.step, self.bits, self.pattern)
        return compressed

    def penalty(self, weight: Tensor, compressed: Tensor) -> Tensor:
        """Return strength times the regularizer of this layer, a scalar; `compressed` is this forward's result."""
        if self.regularizer == "cosine":
            return self.strength * cosine_distance(weight, compressed)
        if self.regularizer == "l2":
            return self.strength * squared_error(weight, compressed)
        if self.regularizer == "sr-ste":
            return self.strength * pruned_decay(weight, self.pattern)
        return weight.new_zeros(())

    @torch.no_grad()
    def mask(self, weight: Tensor) -> Tensor | None:
        """Return the N:M mask in force, bool of the weight's shape, or None for a dense layer."""
        return None if self.pattern is None else nm_mask(weight, *self.pattern)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> CodedTensor:
        """Return Ŵ as int8 codes and one float32 scale a filter, on the host; a per-tensor step is repeated.

        `weight` must hold no NaN: a NaN has no code.
        """
        scale = effective_step(self.step)
        x = _scaled_survivors(weight, along_channels(scale, weight.dim()), self.pattern)
        codes = levels(x, *bounds(self.bits))
        return CodedTensor(
            codes=codes.to(torch.int8).cpu(),
            scale=scale.expand(weight.shape[0]).contiguous().cpu(),
            bits=self.bits,
            axis=0,
            pattern=self.pattern,
        )

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        pattern = "dense" if self.pattern is None else f"{self.pattern[0]}:{self.pattern[1]}"
        return f"{self.bits} bits, {pattern}, a step per {self.granularity}"


class _SlopeFunction(torch.autograd.Function):
    """S and q in one.

    A pruned weight has x = S(w)/s = 0, which is inside the quantizer's range: its gradient passes whole and it adds
    nothing to the step's. So LSQ's backward at x is SLOPE's backward, with no mask to keep.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, bits: int, pattern: tuple[int, int] | None) -> Tensor:
        scale = along_channels(effective_step(step), weight.dim())
        x = _scaled_survivors(weight, scale, pattern)
        ctx.save_for_backward(x, step)
        ctx.bits = bits
        return levels(x, *bounds(bits)).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step = ctx.saved_tensors
        grad_weight, grad_step = gradients(grad, x, step, *bounds(ctx.bits), x.numel() // step.numel())
        return grad_weight, grad_step, None, None


def _scaled_survivors(weight: Tensor, scale: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Return x = S(W)/s, contiguous; `scale` broadcasts over `weight`."""
    weight = weight.contiguous()
    if pattern is None:
        return weight / scale
    survivors = torch.empty_like(weight)
    keep_largest(weight, *pattern, out=survivors)
    return survivors.div_(scale)
