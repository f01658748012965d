"""RoIAlign over a feature pyramid as Gathers from one table: TensorRT-RTX does not know the operator RoiAlign.

Letters: B - images, P - boxes an image, N = B·P, C - channels, T - pixels of all levels, o - bins a side,
r - samples a bin and side.

Each bin is the mean of r² samples, each sample a bilinear mean of 4 pixels (He et al. 2017, Mask R-CNN, section 3,
RoIAlign). Samples are gathered one after the other, [N·o², 4, C] at once: 200 MB for 1000 boxes, 7 x 7 bins and 256
channels, a quarter of what all of them need.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pyramid:
    """How boxes go to the levels of a feature pyramid.

    Attributes:
        scales: Feature pixels per image pixel, finest level first.
        smallest: Size (square root of the area, image pixels) from which on a box belongs to the second, third, ...
            level.
        output: o, bins per side.
        ratio: r, samples per bin and side.
    """

    scales: tuple[float, ...]
    smallest: tuple[float, ...]
    output: int
    ratio: int


def pyramid(
    heights: Sequence[int], image: int, output: int, ratio: int, canonical_scale: int, canonical_level: int
) -> Pyramid:
    """Return torchvision's assignment (MultiScaleRoIAlign): scales are powers of 2, levels by eq. 1 of the FPN paper.

        level = floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6)    Lin et al. 2017, eq. 1

    is turned into sizes to compare with, since a Log of another library would round otherwise.

    Args:
        heights: Of the features, finest level first.
        image: Height of the image.
        output: Bins per side.
        ratio: Samples per bin and side.
        canonical_scale: Size of a box that belongs to the canonical level.
        canonical_level: That level's number: -log2 of its scale.
    """
    exponents = [round(float(torch.tensor(height / image).log2())) for height in heights]
    first, last = -exponents[0], -exponents[-1]
    smallest = [canonical_scale * 2.0 ** (level - canonical_level - 1e-6) for level in range(first + 1, last + 1)]
    return Pyramid(tuple(2.0**e for e in exponents), tuple(smallest), output, ratio)


def pool(features: Sequence[Tensor], boxes: Tensor, levels: Pyramid) -> Tensor:
    """Return what torchvision's MultiScaleRoIAlign returns, within rounding.

    Args:
        features: float32 [B, C, H, W], finest level first.
        boxes: float32 [B, P, 4] in image pixels.
        levels: Where boxes go.

    Returns:
        float32 [N, C, o, o].
    """
    channels, sizes = features[0].shape[1], [(int(f.shape[2]), int(f.shape[3])) for f in features]
    starts = [sum(h * w for h, w in sizes[:level]) for level in range(len(sizes))]
    table = torch.cat([f.flatten(2) for f in features], 2).transpose(1, 2).reshape(-1, channels)  # [B·T, C]
    side = boxes[..., 2:] - boxes[..., :2]
    size = torch.sqrt(side[..., 0] * side[..., 1])  # [B, P]
    # Every box reaches the first limit: with one level alone there would be none, and ONNX Runtime errs on nothing.
    limits = torch.tensor((0.0, *levels.smallest), device=boxes.device)
    level = (size.unsqueeze(-1) >= limits).sum(-1) - 1
    facts = [[x, *size, start] for x, size, start in zip(levels.scales, sizes, starts, strict=True)]
    scale, height, width, start = torch.tensor(facts, device=boxes.device)[level].split(1, -1)  # each [B, P, 1]
    first = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None] * sum(h * w for h, w in sizes)
    first = first + start.to(torch.int64)  # [B, P, 1]: where the level of the image begins in the table

    last = torch.cat([width, height], -1) - 1  # [B, P, 2], as x, y
    pixels, weights = _samples(boxes[..., :2] * scale, boxes[..., 2:] * scale, last, levels)
    across, down = pixels.to(torch.int64).flatten(0, 1).unbind(1)  # each [N, o, r, 2]
    down = down * width.to(torch.int64).reshape(-1, 1, 1, 1) + first.reshape(-1, 1, 1, 1)
    index = down[:, :, None, :, None, :, None] + across[:, None, :, None, :, None]  # [N, o, o, r, r, 2, 2]
    x_weight, y_weight = weights.flatten(0, 1).unbind(1)
    weight = y_weight[:, :, None, :, None, :, None] * x_weight[:, None, :, None, :, None]
    samples = levels.ratio**2
    indices, factors = index.reshape(-1, samples, 4).unbind(1), weight.reshape(-1, samples, 4, 1).unbind(1)
    terms = (
        (torch.index_select(table, 0, one.flatten()).reshape(-1, 4, channels) * factor).sum(1)  # [N·o², C]
        for one, factor in zip(indices, factors, strict=True)
    )
    mean = functools.reduce(torch.add, terms) / samples
    return mean.reshape(-1, levels.output, levels.output, channels).permute(0, 3, 1, 2)


def _samples(low: Tensor, high: Tensor, last: Tensor, levels: Pyramid) -> tuple[Tensor, Tensor]:
    """Return the two neighbours of each sample along x and y, and their weights, both [B, P, 2, o, r, 2].

    Args:
        low: float32 [B, P, 2], where boxes begin, in feature pixels, x and y.
        high: Where they end.
        last: The last pixels of their level.
        levels: For o and r.
    """
    o, r = levels.output, levels.ratio
    step = ((high - low).clamp(min=1.0) / o)[..., None, None]  # as wide as a bin; a box counts as one pixel at least
    bins = torch.arange(o, device=low.device, dtype=low.dtype).reshape(-1, 1)
    inner = torch.arange(r, device=low.device, dtype=low.dtype) + 0.5
    at = low[..., None, None] + bins * step + inner * step / r  # [B, P, 2, o, r]
    last = last[..., None, None]
    inside = (at >= -1.0) & (at <= last + 1)  # a sample farther out counts as 0
    at = torch.minimum(at.clamp(min=0.0), last)
    below = at.floor()
    above = torch.minimum(below + 1, last)
    upper = at - below
    weights = torch.stack([1 - upper, upper], -1) * inside.to(low.dtype).unsqueeze(-1)
    return torch.stack([below, above], -1), weights
