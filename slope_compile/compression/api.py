"""SLOPE for people with a training loop of their own: compress, penalty, codes, statistics, fold.

    report = compress(model, bits=4, pattern="2:4")
    with torch.nn.utils.parametrize.cached():  # the weight is compressed once, for the model and for the penalty
        loss = task_loss(model(x), y) + penalty(model)
        loss.backward()

A compressed layer stays the layer: `weight` is the compressed weight, `parametrizations.weight.original` the latent
that the optimizer moves, `parametrizations.weight.0.step` the quantizer's step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from slope_compile.compression.activations import activation_quantizers
from slope_compile.compression.codes import CodedTensor
from slope_compile.compression.lsq import Granularity, effective_step
from slope_compile.compression.permutation import Permutation, permute_channels
from slope_compile.compression.policy import LayerPlan, plan
from slope_compile.compression.regularizer import AUTO_STRENGTH, Regularizer, cosine_distance, filter_cosines
from slope_compile.compression.sites import Site, attach_sites, find_sites
from slope_compile.compression.slope import Slope
from slope_compile.errors import ModelError
from slope_compile.recipe import recipe_from


class Report(list[LayerPlan]):
    """What each layer got and why; `str(report)` is a table.

    Attributes:
        activations: The tensors that are quantized, and those that stay in float though a rule speaks of them.
        permutation: With `permute`: whose input channels were reordered, and whose not.
    """

    activations: list[Site]
    permutation: Permutation | None = None

    def __init__(self, rows: Iterable[LayerPlan] = (), activations: Iterable[Site] = ()) -> None:
        super().__init__(rows)
        self.activations = list(activations)

    def __str__(self) -> str:
        header = ("layer", "shape", "bits", "pattern", "step per", "input", "why")
        cells = [header, *(_cells(row) for row in self)]
        widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def compress(
    model: nn.Module,
    bits: int = 4,
    pattern: str | None = "2:4",
    method: Literal["slope"] = "slope",
    regularizer: Regularizer = "cosine",
    strength: float | Literal["auto"] = "auto",
    granularity: Granularity = "tensor",
    first_last_bits: int | None = 8,
    activation_bits: int | None = None,
    quantize_outputs: bool = False,
    permute: bool = False,
    strict: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Report:
    """Make the model train with compressed weights, in place; start from trained weights.

    Latents keep their identity as parameters; the steps are new parameters (`step_parameters`), so make the optimizer
    afterwards, without weight decay for the steps.

    Args:
        model: Any model with nn.Conv1d/2d/3d or nn.Linear layers and float32 weights.
        bits: 2 to 8.
        pattern: "n:m", or None for dense.
        method: Only "slope".
        regularizer: What `penalty` measures, on every layer that gets bits, dense 8-bit ones too (theirs is small).
        strength: The factor of the penalty; "auto": cosine 0.1, l2 5e-4, sr-ste 2e-4 (derived in `regularizer.py`).
        granularity: One step per "tensor" or per "channel".
        first_last_bits: For the first convolution and the last linear layer, which stay dense; None: float.
        activation_bits: Bits of what compressed layers read, 2 to 8; the first and the last read `first_last_bits`.
            None: activations stay in float. Steps are set by the first batches in training mode.
        quantize_outputs: With `activation_bits`: also quantize, to 8 bits, what layers return and no layer reads.
        permute: First reorder input channels, in place, so that the patterns keep more magnitude; no output changes.
        strict: Raise if a layer cannot be compressed (`off` and a float first or last layer are choices), or `permute`
            cannot be done at all.
        overrides: Layer-name pattern -> {"bits", "pattern", "granularity", "activation_bits"} or "off".

    Returns:
        One row for every convolution and linear layer, then one for every other weight matrix.

    Raises:
        RecipeError: If an argument is out of range, or an override matches no layer.
        ModelError: If the model is compressed already, has no compressible layer, or holds weights that are not finite.
    """
    section = {
        "bits": bits,
        "pattern": pattern,
        "method": method,
        "regularizer": regularizer,
        "strength": strength,
        "granularity": granularity,
        "first_last_bits": first_last_bits,
        "activation_bits": activation_bits,
        "quantize_outputs": quantize_outputs,
        "permute": permute,
        "strict": strict,
        "overrides": dict(overrides or {}),
    }
    # A recipe's own validation, for its ranges and its error messages; compression looks at no other section.
    spec = recipe_from(
        {"model": {"name": "-"}, "data": {"source": "-"}, "compression": section}, "compress"
    ).compression
    if any(True for _ in _compressed(model)):
        raise ModelError(
            f"{type(model).__name__} is compressed already.", "Compress a fresh model, or `fold` it first."
        )
    report = Report(*find_sites(model, plan(model, spec), spec.quantize_outputs))
    factor = AUTO_STRENGTH[spec.regularizer] if spec.strength == "auto" else spec.strength
    chosen: list[tuple[LayerPlan, Any]] = [
        (row, model.get_submodule(row.name)) for row in report if row.bits is not None
    ]
    for row, layer in chosen:
        _require_finite(row.name, layer.weight)
    if spec.permute:
        report.permutation = permute_channels(model, {r.name: r.pattern for r in report if r.pattern is not None})
    for row, layer in chosen:
        assert row.bits is not None and row.granularity is not None  # chosen above
        slope = Slope(layer.weight, row.bits, row.pattern, row.granularity, spec.regularizer, factor)
        parametrize.register_parametrization(layer, "weight", slope)
    attach_sites(model, report.activations)
    return report


def penalty(model: nn.Module) -> Tensor:
    """Return the sum over compressed layers of strength times regularizer, a differentiable scalar.

    Inside `parametrize.cached()` it reuses the weight of the forward pass; outside it computes each again.
    """
    terms = [slope.penalty(latent, layer.weight) for _, layer, slope, latent in _compressed(model)]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def codes(model: nn.Module) -> dict[str, CodedTensor]:
    """Return every compressed weight as codes and scales on the host, keyed "layer1.0.conv1.weight".

    `dequantize()` equals `layer.weight` bit for bit.

    Raises:
        ModelError: If a latent or a step is not finite, or not float32.
    """
    coded = {}
    for name, _, slope, latent in _compressed(model):
        for tensor in (latent, slope.step):
            if tensor.dtype != torch.float32:
                raise ModelError(
                    f"Layer '{name}' holds {tensor.dtype}, codes are exact in float32 only.", "Use model.float()."
                )
            _require_finite(name, tensor)
        coded[_join(name, "weight")] = slope.codes(latent)
    return coded


def masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the N:M mask in force of every layer with a pattern, bool, keyed by layer name; for mask-flip rates."""
    found = ((name, slope.mask(latent)) for name, _, slope, latent in _compressed(model))
    return {name: mask for name, mask in found if mask is not None}


@torch.no_grad()
def layer_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Measure every compressed layer, keyed by layer name.

    Returns:
        cosine: mean over filters of cos(w_i, ŵ_i); sqnr_db: 10 log10(sum w² / sum (w - ŵ)²), dB, inf where ŵ = w;
        density: share of weights that are not zero; step: the step in use, its mean over channels.
    """
    return {name: _statistics(latent, layer.weight, slope) for name, layer, slope, latent in _compressed(model)}


def weight_cosines(model: nn.Module) -> dict[str, Tensor]:
    """Return the cosine of each filter's latent with its compressed weight, keyed by layer name: `filter_cosines`."""
    return {name: filter_cosines(latent, layer.weight) for name, layer, _, latent in _compressed(model)}


def step_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the step parameters, which take no weight decay: of weights, then of activations."""
    weights = [slope.step for _, _, slope, _ in _compressed(model)]
    return weights + [quantizer.step for _, quantizer in activation_quantizers(model)]


def fold(model: nn.Module) -> None:
    """Replace every latent by its compressed weight and remove the parametrizations, in place.

    Quantizers of activations stay: the model computes what it computed before.
    """
    for _, layer, _, _ in list(_compressed(model)):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _compressed(model: nn.Module) -> Iterator[tuple[str, Any, Slope, Tensor]]:
    """Yield (name, layer, its Slope, its latent) of every compressed layer."""
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            chain: Any = layer.parametrizations["weight"]
            if isinstance(chain[0], Slope):
                yield name, layer, chain[0], chain.original


def _statistics(w: Tensor, w_hat: Tensor, slope: Slope) -> dict[str, float]:
    signal, noise = w.double().square().sum().item(), (w.double() - w_hat.double()).square().sum().item()
    return {
        "cosine": 1.0 - cosine_distance(w, w_hat).item(),
        "sqnr_db": 10 * math.log10(signal / noise) if signal and noise else math.inf,
        "density": torch.count_nonzero(w_hat).item() / w_hat.numel(),
        "step": effective_step(slope.step).mean().item(),
    }


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ModelError(f"Layer '{name}' holds values that are NaN or infinite.", "Load or train finite weights.")


def _join(layer: str, tensor: str) -> str:
    return f"{layer}.{tensor}" if layer else tensor


def _cells(row: LayerPlan) -> tuple[str, ...]:
    pattern = "dense" if row.pattern is None else f"{row.pattern[0]}:{row.pattern[1]}"
    if row.bits is None:
        return (row.name, "x".join(map(str, row.shape)), "float", "", "", "", row.reason)
    shape, read = "x".join(map(str, row.shape)), "float" if row.activation_bits is None else f"{row.activation_bits}"
    return (row.name, shape, str(row.bits), pattern, row.granularity or "", read, row.reason)
