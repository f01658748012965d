"""Which layer gets which treatment, and why: one row for every weight matrix of a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from slope_compile.compression.channels import NotTraceableError, read_spaces
from slope_compile.compression.codes import kernel_note
from slope_compile.compression.leftovers import left_matrices
from slope_compile.compression.lsq import Granularity
from slope_compile.errors import ModelError, RecipeError, nearest
from slope_compile.recipe import CompressionSection, parse_pattern

Layer = _ConvNd | nn.Linear

# What torchvision's detectors call the layers whose outputs are the answer: scores, box offsets, mask pixels.
PREDICTIONS = ("cls_logits", "bbox_pred", "cls_score", "mask_fcn_logits")

# Convolutions of timm that normalize their weight on the way to the kernel: what multiplies is not what is coded.
_STANDARDIZED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets.

    Attributes:
        name: The module's name, "layer1.0.conv1"; of a matrix that is no conv or linear weight the parameter's name.
        kind: "conv", "linear", or "other", which stays in float.
        shape: Of the weight.
        bits: 2 to 8; None: the weight stays in float.
        pattern: (n, m) along axis 1; None: dense.
        granularity: One step per "tensor" or per "channel"; None where the weight stays in float.
        reason: Why.
        activation_bits: Bits of its input, 2 to 8; None: the input stays in float.
        activation_reason: Why, where activations are quantized.
    """

    name: str
    kind: Literal["conv", "linear", "other"]
    shape: tuple[int, ...]
    bits: int | None
    pattern: tuple[int, int] | None
    granularity: Granularity | None
    reason: str
    activation_bits: int | None = None
    activation_reason: str = ""


def plan(model: nn.Module, spec: CompressionSection) -> list[LayerPlan]:
    """Decide for every convolution and linear layer, in the order of `model.named_modules()`, then list other matrices.

    The first convolution and the last linear layer (the last convolution of a model without linear layers) get
    `first_last_bits` and no pattern, as in the LSQ paper; first and last in the order in which modules are defined. So
    do all of a detector's prediction layers: each is the last of its branch.
    Of several matching overrides the later wins, key by key.

    Raises:
        RecipeError: If an override matches no layer, or outputs are to be quantized and inputs are not.
        ModelError: If a layer has no weight yet, or none can be compressed; if `strict`, also if one cannot be.
    """
    if spec.quantize_outputs and spec.activation_bits is None:
        raise RecipeError(
            "quantize_outputs is set and activation_bits is not: outputs are quantized for layers that read INT8.",
            "Set activation_bits to 8 or 4.",
        )
    layers: dict[str, Layer] = {
        n: module for n, module in model.named_modules() if isinstance(module, (_ConvNd, nn.Linear))
    }
    others = left_matrices(model)
    for pattern in spec.overrides:
        if not any(fnmatchcase(name, pattern) for name in (*layers, *others)):
            raise RecipeError(f"Override '{pattern}' matches no convolution or linear layer.", nearest(pattern, layers))
    for name, module in layers.items():
        if is_lazy(module.weight):
            raise ModelError(f"Layer '{name}' is lazy: it has no weight yet.", "Run one batch through the model first.")
    obstacles = _obstacles(model, layers)
    edges = _edges(layers)
    rows = [_row(name, module, spec, obstacles.get(name), edges.get(name)) for name, module in layers.items()]
    rows += [LayerPlan(name, "other", other.shape, None, None, None, other.reason) for name, other in others.items()]
    if spec.strict:
        _require_all(model, rows, spec, {*obstacles, *others})
    if all(row.bits is None for row in rows):
        why = "; ".join(f"{row.name}: {row.reason}" for row in rows[:3]) or "it has no convolution or linear layer"
        raise ModelError(
            f"No layer of {type(model).__name__} can be compressed ({why}).",
            "Choose a model with convolutions or linear layers, or relax first_last_bits and overrides.",
        )
    return rows


def _require_all(model: nn.Module, rows: list[LayerPlan], spec: CompressionSection, hindered: set[str]) -> None:
    """Raise unless whatever stays in float stays so by choice."""
    off = [glob for glob, keys in spec.overrides.items() if keys == "off"]
    left = [row for row in rows if row.name in hindered and not any(fnmatchcase(row.name, glob) for glob in off)]
    if left:
        listed = "; ".join(f"'{row.name}': {row.reason}" for row in left)
        raise ModelError(
            f"strict: {len(left)} layer(s) of {type(model).__name__} cannot be compressed: {listed}.",
            "Name each in compression.overrides as `off`, or set compression.strict: false.",
        )
    if spec.permute:
        try:
            read_spaces(model)
        except NotTraceableError as error:
            raise ModelError(
                f"strict: no channel can be permuted: {error}.", "Set compression.permute or compression.strict: false."
            ) from error


def _obstacles(model: nn.Module, layers: dict[str, Layer]) -> dict[str, str]:
    """Say why a layer's weight cannot be replaced: layer name -> reason."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    attention = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )
    found = {}
    for name, module in layers.items():
        if attention and name.startswith(attention):
            found[name] = "inside nn.MultiheadAttention, whose fused kernels take the raw weight"
        elif isinstance(module, _ConvTransposeNd):
            found[name] = "transposed convolution: its input channels run along axis 0"
        elif parametrize.is_parametrized(module, "weight") or "weight" not in module._parameters:
            found[name] = "its weight is already computed from other parameters"
        elif any(cls.__name__ in _STANDARDIZED for cls in type(module).__mro__):
            found[name] = "it standardizes its weight before use"
        elif owners[id(module.weight)] > 1:
            found[name] = "its weight is shared with another module"
        elif str(module.weight.dtype) != "torch.float32":
            found[name] = f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not float32"
    return found


def _edges(layers: dict[str, Layer]) -> dict[str, str]:
    """Name the first convolution, the last linear layer and a detector's predictions: layer name -> what it is."""
    convs = [
        n for n, module in layers.items() if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd)
    ]
    linears = [name for name, module in layers.items() if isinstance(module, nn.Linear)]
    edges = {name: "prediction layer of a detector" for name in layers if name.rpartition(".")[2] in PREDICTIONS}
    if linears:
        edges[linears[-1]] = "last linear layer"
    elif convs:
        edges[convs[-1]] = "last convolution of a model without linear layers"
    if convs:
        edges[convs[0]] = "first convolution"
    return edges


def _row(name: str, module: Layer, spec: CompressionSection, obstacle: str | None, edge: str | None) -> LayerPlan:
    """Decide for one layer: obstacle, then override, then edge, then the general rule; the pattern must fit."""
    depthwise = isinstance(module, _ConvNd) and module.groups > 1 and module.weight.shape[1] == 1
    kind: Literal["conv", "linear"] = "conv" if isinstance(module, _ConvNd) else "linear"
    row = LayerPlan(name, kind, tuple(module.weight.shape), None, None, None, "")
    if obstacle is not None:
        return replace(row, reason=obstacle)
    if edge is None:
        bits: int | None = spec.bits
        pattern, reason = _parse(spec.pattern), "the general rule"
    else:
        bits, pattern = spec.first_last_bits, None
        reason = edge
    granularity: Granularity = spec.granularity
    activation = spec.activation_bits
    if activation is not None and edge is not None:
        activation = spec.first_last_bits
    for glob, keys in spec.overrides.items():
        if not fnmatchcase(name, glob):
            continue
        reason = f"override '{glob}'"
        if keys == "off":
            bits, pattern = None, None
            continue
        override = CompressionSection(**keys)
        bits = override.bits if "bits" in keys else bits
        pattern = _parse(override.pattern) if "pattern" in keys else pattern
        granularity = override.granularity if "granularity" in keys else granularity
        activation = override.activation_bits if "activation_bits" in keys else activation
    if bits is None:
        return replace(row, reason=f"{reason}: left in float")
    if pattern is not None and row.shape[1] % pattern[1]:
        channels = f"{row.shape[1]} input channel{'s' if row.shape[1] > 1 else ''} a filter"
        reason = f"{reason}; dense: {'depthwise, ' if depthwise else ''}{channels}, not divisible by {pattern[1]}"
        pattern = None
    if pattern is not None and (note := kernel_note(*pattern)):
        reason = f"{reason}; {note}"
    return replace(row, bits=bits, pattern=pattern, granularity=granularity, reason=reason, activation_bits=activation)


def _parse(pattern: str | None) -> tuple[int, int] | None:
    return None if pattern is None else parse_pattern(pattern)
