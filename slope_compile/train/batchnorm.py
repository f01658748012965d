"""Batch norm over the whole batch where several processes each hold a share of it, on any device.

torch's own SyncBatchNorm works on GPUs only, and replaces modules. Here the modules stay what they are, subclasses with
a forward pass of their own included: while `synchronized` holds, the statistics that they ask for span all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules._functions import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode


@contextmanager
def synchronized(model: nn.Module) -> Iterator[None]:
    """Let every batch norm of the model take its training statistics over all ranks; alone, change nothing."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)] if _ranks() > 1 else []
    for norm in norms:
        norm.forward = _across_ranks(norm.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward  # the class's own again


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _across_ranks(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        with _Intercept():
            return forward(*arguments, **keywords)

    # Compiled code calls it as it is: a collective inside a compiled graph would need one of the compiler's own.
    return cast("Callable[..., Any]", torch.compiler.disable(call))


class _Intercept(TorchFunctionMode):
    """Answers `F.batch_norm` in training; every other function runs as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        run = _batch_norm if func is F.batch_norm else func
        return run(*args, **(kwargs or {}))


def _batch_norm(  # with the names of F.batch_norm, for calls by keyword
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    running = (running_mean, running_var)
    normalized: Tensor
    if input.is_cuda:  # fused kernels
        group = dist.group.WORLD
        normalized = SyncBatchNorm.apply(input, weight, bias, *running, eps, momentum, group, dist.get_world_size())
    else:
        normalized = _Normalize.apply(input, weight, bias, *running, eps, momentum)
    return normalized


class _Normalize(torch.autograd.Function):
    """y = x̂ γ + β with x̂ = (x - μ)/√(σ² + ε), where μ, σ² and N are of all ranks together.

    dx = γ/√(σ² + ε) (g - Σg/N - x̂ Σ(g x̂)/N), the sums over all ranks; dγ = Σ g x̂ and dβ = Σ g of this rank alone,
    as every other parameter's gradient is before the ranks' are averaged.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (n, C, ...)
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
    ) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = wide.new_tensor([x.numel() / x.shape[1]])
        *sums, total = _summed(torch.cat([_channels(wide), count])).tensor_split([x.shape[1]])
        mean = sums[0] / total  # [C]
        centred = wide - _column(mean, x)
        # A second pass, around the mean: the difference of two large sums has few digits left.
        variance = _summed(_channels(centred.square())) / total  # [C]
        if running_mean is not None and running_var is not None:
            unbiased = variance * total / (total - 1).clamp(min=1)
            running_mean.lerp_(mean.to(running_mean), momentum)
            running_var.lerp_(unbiased.to(running_var), momentum)
        inverse = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, total)
        y = centred.mul_(_column(inverse, x))
        y = y if weight is None else y.mul_(_column(weight, x))
        y = y if bias is None else y.add_(_column(bias, x))
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, total = ctx.saved_tensors
        g = grad.to(mean.dtype)
        normalized = (x.to(mean.dtype) - _column(mean, x)).mul_(_column(inverse, x))
        of_bias, of_weight = _channels(g), _channels(g * normalized)  # [C] each
        first, second = (_summed(torch.cat([of_bias, of_weight])) / total).tensor_split(2)
        factor = inverse if weight is None else inverse * weight  # [C]
        dx = (g - _column(first, x) - normalized.mul_(_column(second, x))).mul_(_column(factor, x))
        affine = [sums if ctx.needs_input_grad[k] else None for k, sums in ((1, of_weight), (2, of_bias))]
        return dx.to(x.dtype), *affine, None, None, None, None


def _summed(values: Tensor) -> Tensor:
    dist.all_reduce(values)
    return values


def _channels(x: Tensor) -> Tensor:
    """Return the sums over all axes but 1: (n, C, ...) -> [C]."""
    return x.sum(dim=[axis for axis in range(x.dim()) if axis != 1])


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Reshape [C] so that it broadcasts over (n, C, ...)."""
    return values.view(1, -1, *[1] * (like.dim() - 2))
