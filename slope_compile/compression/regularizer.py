"""The penalties that pull a latent weight towards its compressed self, ŵ held fixed (detached).

SLOPE's cosine: https://arxiv.org/abs/2511.08360. SR-STE: https://arxiv.org/abs/2102.04010, eq. 8. L2 is SLOPE's
ablation. Letters: K output filters, w_i and ŵ_i the latent and the compressed weight of filter i, E the N:M mask.

Strengths meant by "auto":

* cosine 0.1. Its gradient decays a pruned weight at the rate λc/(K‖w_i‖²); with ‖w_i‖² of 0.7 to 0.9 the rate 2e-4 of
  SR-STE is reached at λ = 0.01 (64 filters) to 0.07 (512 filters). Of 0.01 to 1, 0.1 gave the best accuracy in our
  measurement on a small ResNet at 2 bits (83.9 % against 83.3 % without penalty; 1 aligned better and lost 0.7).
* l2 5e-4, the value of the same measurement (83.7 %); a pruned weight decays at the rate 2λ.
* sr-ste 2e-4, the paper's λ_w.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from slope_compile.compression.sparsity import keep_largest

Regularizer = Literal["none", "l2", "sr-ste", "cosine"]
AUTO_STRENGTH: dict[Regularizer, float] = {"none": 0.0, "l2": 5e-4, "sr-ste": 2e-4, "cosine": 0.1}


def cosine_distance(w: Tensor, w_hat: Tensor) -> Tensor:
    """Return the mean over filters of 1 - cos(w_i, ŵ_i), a scalar; a filter with a norm of zero counts as 0.

    Args:
        w: Latent weight, float (K, ...).
        w_hat: Compressed weight, same shape; taken as a constant.
    """
    distance: Tensor = _CosineDistance.apply(w, w_hat.detach())
    return distance


@torch.no_grad()
def filter_cosines(w: Tensor, w_hat: Tensor) -> Tensor:
    """Return cos(w_i, ŵ_i) of each filter, float64 (K,) within [0, 1]; NaN where a filter's norm is zero.

    None is negative: ŵ has the signs of w, and zeros.

    Args:
        w: Latent weight, float (K, ...).
        w_hat: Compressed weight, same shape.
    """
    flat, flat_hat = w.double().flatten(1), w_hat.double().flatten(1)  # [K, C*R*S]
    norms = torch.linalg.vector_norm(flat, dim=1) * torch.linalg.vector_norm(flat_hat, dim=1)  # [K]
    cosines: Tensor = (flat * flat_hat).sum(dim=1) / norms
    return cosines.clamp(0.0, 1.0)  # rounding may lead past 1; NaN stays NaN


def squared_error(w: Tensor, w_hat: Tensor) -> Tensor:
    """Return the sum of (w - ŵ)², a scalar; ŵ is taken as a constant."""
    return (w - w_hat.detach()).square().sum()


def pruned_decay(w: Tensor, pattern: tuple[int, int] | None) -> Tensor:
    """Return half the sum of ((1 - E) w)², a scalar, whose gradient (1 - E) w is SR-STE's decay.

    Args:
        w: Latent weight, float (K, C, ...).
        pattern: (n, m) of E; None for a dense layer, which has nothing to decay.
    """
    if pattern is None:
        return w.new_zeros(())
    survivors = torch.empty_like(w, memory_format=torch.contiguous_format)
    keep_largest(w.detach().contiguous(), *pattern, out=survivors)
    return 0.5 * squared_error(w, survivors)


class _CosineDistance(torch.autograd.Function):
    """d(1 - cos)/dw = (cos * w/‖w‖ - ŵ/‖ŵ‖) / ‖w‖, in two passes over the weight."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, w_hat: Tensor) -> Tensor:
        flat, flat_hat = w.flatten(1), w_hat.flatten(1)  # [K, C*R*S]
        norm = torch.linalg.vector_norm(flat, dim=1)  # [K]
        norm_hat = torch.linalg.vector_norm(flat_hat, dim=1)  # [K]
        product = norm * norm_hat
        defined = product > 0
        # Not vecdot: autocast would run it in bfloat16, where 1 - cos has no digits left.
        cosine = torch.where(defined, (flat * flat_hat).sum(dim=1) / product, 1.0)
        along_w = torch.where(defined, cosine / norm / norm, 0.0)
        along_w_hat = torch.where(defined, -1.0 / product, 0.0)
        ctx.save_for_backward(w, w_hat, along_w, along_w_hat)
        return (1.0 - cosine).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        w, w_hat, along_w, along_w_hat = ctx.saved_tensors
        share = grad / w.shape[0]
        column = (-1, *[1] * (w.dim() - 1))
        gradient = w * (along_w * share).view(column)
        return gradient.addcmul_(w_hat, (along_w_hat * share).view(column)), None
