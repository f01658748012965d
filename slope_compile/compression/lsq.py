"""Learned step size quantization: Esser et al., ICLR 2020, https://arxiv.org/abs/1902.08153.

Letters: v weights, s step, b bits, Qn = 2^(b-1), Qp = 2^(b-1) - 1, N weights that share a step. Activations take the
same formulas with a range of their own: `activations.py`.

The parameter that the optimizer moves may reach or cross zero; the step in use is always s = |parameter| + 1e-12.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Granularity = Literal["tensor", "channel"]
SMALLEST_STEP = 1e-12


def bounds(bits: int) -> tuple[int, int]:
    """Return (Qn, Qp) of signed weights: 2^(b-1), 2^(b-1) - 1 (section 2).

    Raises:
        ValueError: If `bits` is not within 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"{bits} bits; 2 to 8 are possible")
    return 2 ** (bits - 1), 2 ** (bits - 1) - 1


def lsq(v: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return v̂ = s * round(clip(v / s, -Qn, Qp)) (eq. 1 and 2) with the paper's gradients.

    dv̂/dv = 1 where -Qn < v/s < Qp, else 0 (eq. 5). dv̂/ds = round(v/s) - v/s where -Qn < v/s < Qp, -Qn at and below,
    Qp at and above (eq. 3), times 1/sqrt(N * Qp) (section 2.2).

    Args:
        v: Float weights, any shape; axis 0 is the channel axis where `step` has one entry a channel.
        step: The step parameter: a scalar, or [v.shape[0]]; N is counted per step.
        bits: 2 to 8.

    Returns:
        The shape and type of `v`.

    Raises:
        ValueError: If `bits` is out of range or `step` has another shape.
    """
    bounds(bits)
    if step.dim() != 0 and step.shape != v.shape[:1]:
        raise ValueError(f"step of shape {tuple(step.shape)} does not fit weights of shape {tuple(v.shape)}")
    quantized: Tensor = _Lsq.apply(v, step, bits)
    return quantized


def effective_step(step: Tensor) -> Tensor:
    """Return the step in use, |parameter| + 1e-12: positive wherever an optimizer leaves the parameter."""
    return step.detach().abs() + SMALLEST_STEP


def step_init(weight: Tensor, bits: int, granularity: Granularity) -> Tensor:
    """Return the paper's initial step 2<|v|>/sqrt(Qp) (section 2.1), measured on the dense weight.

    A channel of zeros has no magnitude to measure and takes the mean over the tensor; a tensor of zeros takes
    torch's default initialization, <|v|> = 1/(2 sqrt(fan-in)). A step of zero could never grow into a useful one.

    Args:
        weight: Float [K, ...], finite.
        bits: 2 to 8.
        granularity: One step per tensor, or one per output channel (axis 0).

    Returns:
        A scalar or [K], the type of `weight`.
    """
    qn, qp = bounds(bits)
    flat = weight.detach().reshape(weight.shape[0], -1).abs().double()  # float32 would overflow in the sum
    channel = flat.mean(dim=1)  # [K]
    tensor = channel.mean()
    tensor = torch.where(tensor > 0, tensor, 0.5 / math.sqrt(flat.shape[1]))
    magnitude = tensor if granularity == "tensor" else torch.where(channel > 0, channel, tensor)
    largest = torch.finfo(weight.dtype).max / (2 * qn)  # codes * step stays finite
    return (2 * magnitude / math.sqrt(qp)).clamp(max=largest).to(weight.dtype)


def levels(x: Tensor, qn: int, qp: int) -> Tensor:
    """Return round(clip(x, -Qn, Qp)) as floats (ties to even), with no negative zero; x is v / s."""
    # Integer codes know no -0, so a weight of -0.0 would differ from codes * scale in its sign bit: -0 + 0 = +0.
    return x.clamp(-qn, qp).round_().add_(0.0)


def along_channels(step: Tensor, dim: int) -> Tensor:
    """Reshape a scalar or [K] step so that it broadcasts over (K, ...) weights of `dim` dimensions."""
    return step if step.dim() == 0 else step.view(-1, *[1] * (dim - 1))


def gradients(grad: Tensor, x: Tensor, step: Tensor, qn: int, qp: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of the loss by v and by the step parameter (eq. 3 and 5, section 2.2).

    Args:
        grad: dL/dv̂.
        x: v / s, (K, ...).
        step: The parameter, a scalar or [K].
        qn: Levels below zero.
        qp: Levels above zero.
        count: N of the step's gradient scale 1/sqrt(N * Qp): weights that share a step, or features of one item.
    """
    # hardtanh's backward kernel is eq. 5, strict at both ends: its first argument where -Qn < x < Qp, else 0.
    grad_v = torch.ops.aten.hardtanh_backward(grad, x, -qn, qp)
    inside = torch.ops.aten.hardtanh_backward(x, x, -qn, qp)
    slope = levels(x, qn, qp).sub_(inside)  # eq. 3: round(x) - x inside, -Qn or Qp outside
    product = slope.mul_(grad)
    total = product.sum() if step.dim() == 0 else product.flatten(1).sum(dim=1)
    sign = torch.where(step < 0, -1.0, 1.0).to(x.dtype)  # d|p|/dp, with 1 at zero so that the step can leave it
    return grad_v, total * sign / math.sqrt(count * qp)


class _Lsq(torch.autograd.Function):
    """Eq. 1 and 2 forward, eq. 3 and 5 backward."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, bits: int) -> Tensor:
        scale = along_channels(effective_step(step), v.dim())
        x = v.contiguous() / scale
        ctx.save_for_backward(x, step)
        ctx.bits = bits
        return levels(x, *bounds(bits)).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, step = ctx.saved_tensors
        grad_v, grad_step = gradients(grad, x, step, *bounds(ctx.bits), x.numel() // step.numel())
        return grad_v, grad_step, None
