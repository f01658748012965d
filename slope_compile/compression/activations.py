"""Learned step sizes for activations: LSQ (Esser et al., ICLR 2020, https://arxiv.org/abs/1902.08153) per tensor.

Letters: v activations, s step, b bits, Qn and Qp levels below and above zero, N features of one item (section 2.2).

    v̂ = s * round(clip(v / s, -Qn, Qp))             signed: Qn = 2^(b-1), Qp = 2^(b-1) - 1
                                                    unsigned: Qn = 0, Qp = min(2^b - 1, 127)

Unsigned levels stop at 127: they ride in INT8, the only integer type of activations that TensorRT takes, and its range
ends there. So at 8 bits a tensor without negative values has 128 levels, as in TensorRT's own calibration; below 8 bits
it has all 2^b.

A quantizer belongs to a module (`layer1.0.conv1.input_quantizer`) and works in that module's hooks, so the module stays
what it is. Which modules get one: `sites.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slope_compile.compression.lsq import bounds, effective_step, gradients, levels
from slope_compile.errors import ModelError

INT8_MAX = 127
OBSERVED_CALLS = 8  # training calls whose mean magnitude sets the first step; from then on it is only learned
INPUT, OUTPUT = "input_quantizer", "output_quantizer"


class ActivationQuantizer(nn.Module):
    """Fake quantization of one tensor, its step learned, its range chosen by the first batches.

    In the first 8 training calls the step is 2<|v|>/sqrt(Qp) (section 2.1) of all values seen so far, on all ranks, and
    the range is unsigned as long as no value was negative. After them the sign is settled. Everything is in the state
    dict. What is quantized is computed in float32, whatever the type of the tensor.

    Args:
        bits: 2 to 8.
        device: Where the module that it belongs to is.

    Attributes:
        step: The parameter, a float32 scalar; the step in use is |parameter| + 1e-12.
        calls: int64, training calls observed so far, at most 8.
        magnitude: float32, mean of |v| over them.
        signed: bool, whether one of them had a negative value.
    """

    step: nn.Parameter
    calls: Tensor
    magnitude: Tensor
    signed: Tensor

    def __init__(self, bits: int, device: torch.device | None = None) -> None:
        super().__init__()
        bounds(bits)
        self.bits = bits
        self.step = nn.Parameter(torch.ones((), device=device))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("magnitude", torch.zeros((), device=device))
        self.register_buffer("signed", torch.zeros((), dtype=torch.bool, device=device))
        self._settled: tuple[int, int] | None = None  # (Qn, Qp), kept so that no GPU is asked for it at every call

    def forward(self, v: Tensor) -> Tensor:
        """Return v̂, the shape and type of `v`; a batch is its axis 0.

        Raises:
            ModelError: In evaluation mode, if no batch was seen in training mode and there is anything to quantize.
        """
        qn, qp = self._settled or self._prepare(v)
        quantized: Tensor = _Quantize.apply(v, self.step, qn, qp)
        return quantized

    def levels(self) -> tuple[int, int]:
        """Return (Qn, Qp) as far as the batches seen tell."""
        return activation_bounds(self.bits, bool(self.signed))

    def extra_repr(self) -> str:
        """Return what `print(model)` shows."""
        return f"{self.bits} bits"

    @torch.compiler.disable  # it asks for values and for other ranks
    def _prepare(self, v: Tensor) -> tuple[int, int]:
        """Return (Qn, Qp) after a look at the batch, while the range is not settled."""
        if self.training and int(self.calls) < OBSERVED_CALLS:
            self._observe(v.detach())
        calls = int(self.calls)
        if calls == 0 and not self.training and bool(v.any()):
            raise ModelError(
                "An activation quantizer has seen no batch, so it has no step yet.",
                "Train the model, or run a batch through it in training mode, before it is evaluated or exported.",
            )
        if calls >= OBSERVED_CALLS:
            self._settled = self.levels()
        return self.levels()

    @torch.no_grad()
    def _observe(self, v: Tensor) -> None:
        count = torch.tensor(float(v.numel()), dtype=torch.float64, device=v.device)
        seen = torch.stack([v.abs().sum(dtype=torch.float64), count, (v < 0).sum(dtype=torch.float64)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(seen)  # every rank sets the same step
        magnitude, number, negative = seen.tolist()
        if magnitude == 0.0:  # zeros, or no items at all: they say nothing, and any step keeps a zero
            return
        self.calls += 1
        self.magnitude += (magnitude / number - self.magnitude) / self.calls
        self.signed |= negative > 0
        self.step.copy_(2 * self.magnitude / math.sqrt(self.levels()[1]))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._settled = None
        super()._load_from_state_dict(*args, **kwargs)


def activation_bounds(bits: int, signed: bool) -> tuple[int, int]:
    """Return (Qn, Qp): as for weights where signed, else 0 and 2^b - 1, at most 127."""
    return bounds(bits) if signed else (0, min(2**bits - 1, INT8_MAX))


def attach(modules: Mapping[str, nn.Module], quantizer: ActivationQuantizer, side: str) -> None:
    """Make modules quantize their first argument or what they return, all with one quantizer.

    Args:
        modules: Name -> module.
        quantizer: Theirs from now on.
        side: `INPUT` or `OUTPUT`, the attribute under which each module holds it.

    Raises:
        ModelError: If a module has an attribute of that name.
    """
    for name, module in modules.items():
        if hasattr(module, side):
            raise ModelError(f"Module '{name}' already has an attribute '{side}'.", "Rename it in the model.")
        module.add_module(side, quantizer)
        if side == INPUT:
            module.register_forward_pre_hook(_quantize_input, with_kwargs=True)
        else:
            module.register_forward_hook(_quantize_output)


def activation_quantizers(model: nn.Module) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Yield (`layer1.0.conv1.input`, its quantizer); one that several modules share comes once, under the first."""
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            yield site_name(name), module


@dataclass(frozen=True)
class TrainedQuantizer:
    """What a trained quantizer does: round(clip(v / scale, low, high)) * scale.

    Attributes:
        name: `layer1.0.conv1.input`.
        bits: 2 to 8.
        scale: The step in use, float32.
        low: The lowest level, -Qn.
        high: The highest, Qp.
    """

    name: str
    bits: int
    scale: float
    low: int
    high: int


def trained_quantizers(model: nn.Module) -> dict[str, TrainedQuantizer]:
    """Return the quantizers of a model by name.

    Raises:
        ModelError: If a step is not finite, or not float32.
    """
    found = {}
    for name, quantizer in activation_quantizers(model):
        step = quantizer.step.detach()
        if step.dtype != torch.float32 or not bool(torch.isfinite(step)):
            raise ModelError(
                f"The step of the activation quantizer '{name}' is {step.item()} ({step.dtype}).",
                "Train finite float32 steps.",
            )
        qn, qp = quantizer.levels()
        found[name] = TrainedQuantizer(name, quantizer.bits, effective_step(step).item(), -qn, qp)
    return found


def site_name(quantizer: str) -> str:
    """Return `layer1.0.conv1.input` for the quantizer `layer1.0.conv1.input_quantizer`."""
    return quantizer.removesuffix("_quantizer")


# Hooks are functions of a module, not closures: a deep copy of the model then works with the copy's quantizers.
def _quantize_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if args:
        return (module.input_quantizer(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: module.input_quantizer(kwargs[first])}


def _quantize_output(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    return module.output_quantizer(output)


class _Quantize(torch.autograd.Function):
    """Eq. 1 and 2 forward, eq. 3 and 5 backward, with a range of activations."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, step: Tensor, qn: int, qp: int) -> Tensor:
        scale = effective_step(step)
        x = v.float() / scale
        # A copy of the step: a second call may set it anew before this one's gradient is asked for.
        ctx.save_for_backward(x, step.detach().clone())
        ctx.levels = (qn, qp)
        return levels(x, qn, qp).mul_(scale).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, step = ctx.saved_tensors
        qn, qp = ctx.levels
        features = x.numel() // max(len(x), 1) or 1  # N
        grad_v, grad_step = gradients(grad.float(), x, step, qn, qp, features)
        return grad_v.to(grad.dtype), grad_step, None, None
