"""Weight matrices that are the weight of no convolution or linear layer: they stay in float, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

# They have a row of their own, factors of single features, or the parts that another weight is computed from.
_ACCOUNTED = (_ConvNd, nn.Linear, nn.LayerNorm, nn.RMSNorm, ParametrizationList)


@dataclass(frozen=True)
class Leftover:
    """A matrix that stays in float: its shape and why."""

    shape: tuple[int, ...]
    reason: str


def left_matrices(model: nn.Module) -> dict[str, Leftover]:
    """Return the parameters with two or more axes longer than 1, by name, a final ".weight" left out.

    A first axis of 1 runs along the batch: a token or a position embedding, which is added and not multiplied.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, _ACCOUNTED):
            continue
        for key, parameter in module._parameters.items():
            if parameter is None or is_lazy(parameter) or not _is_matrix(tuple(parameter.shape)):
                continue
            path = f"{name}.{key}" if name else key
            found[path.removesuffix(".weight")] = Leftover(tuple(parameter.shape), _reason(module))
    return found


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[0] > 1 and sum(length > 1 for length in shape) > 1


def _reason(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "inside nn.MultiheadAttention, whose fused kernels take the raw weight"
    if isinstance(module, nn.RNNBase):
        return f"inside nn.{kind}, whose fused kernels take the raw weights"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return f"nn.{kind} looks rows up and multiplies with none"
    return f"a parameter of {kind}, which is no convolution or linear layer"
