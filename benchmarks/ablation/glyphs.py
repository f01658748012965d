"""Procedurally drawn images: glyphs of three pen strokes, warped, half hidden by another glyph, in noise.

Every image is drawn from a seed, so training never sees one twice: what limits the accuracy is the network's capacity,
as on ImageNet, and not the size of the data set.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSES = 64
SIDE = 16  # of an image, pixels
NOISE = 0.2  # standard deviation
ALPHABET_SEED = 1234
PEN = 0.07  # of a half image
BLANK = 48  # side of the drawing that the images are sampled from


def alphabet(classes: int = CLASSES) -> Tensor:
    """Return one drawing a class, float32 [classes, BLANK, BLANK] in 0..1: three quadratic Bézier strokes each."""
    generator = torch.Generator().manual_seed(ALPHABET_SEED)
    axis = torch.linspace(-1, 1, BLANK)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    t = torch.linspace(0, 1, 24)[:, None]
    drawings = torch.zeros(classes, BLANK, BLANK)
    for drawing in drawings:
        for _ in range(3):
            p = torch.rand(3, 2, generator=generator) * 1.5 - 0.75
            points = (1 - t) ** 2 * p[0] + 2 * t * (1 - t) * p[1] + t**2 * p[2]  # [24, 2]
            distance = (x[None] - points[:, 0, None, None]) ** 2 + (y[None] - points[:, 1, None, None]) ** 2
            drawing.copy_(torch.maximum(drawing, torch.exp(-distance.min(dim=0).values / (2 * PEN**2))))
    return drawings


def draw(drawings: Tensor, items: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images float32 [items, 1, SIDE, SIDE] and labels int64 [items]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(drawings), (items,), generator=generator)
    image = _warped(drawings[labels], generator)
    hidden_by = torch.randint(len(drawings), (items,), generator=generator)
    clutter = _warped(drawings[hidden_by], generator) * 0.6 * torch.rand(items, 1, 1, 1, generator=generator)
    contrast = torch.rand(items, 1, 1, 1, generator=generator) * 0.7 + 0.5
    image = torch.maximum(image, clutter) * contrast
    return image + NOISE * torch.randn(image.shape, generator=generator), labels


def _warped(drawings: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shear and shift each of [n, BLANK, BLANK] on its own; returns [n, 1, SIDE, SIDE]."""
    items = len(drawings)
    angle, shear_x, shear_y, shift_x, shift_y = torch.rand(5, items, generator=generator) * 2 - 1
    scale = torch.rand(items, generator=generator) * 0.5 + 0.85
    cos, sin = torch.cos(0.5 * angle) * scale, torch.sin(0.5 * angle) * scale
    rows = [cos, 0.15 * shear_x - sin, 0.25 * shift_x, 0.15 * shear_y + sin, cos, 0.25 * shift_y]
    matrix = torch.stack(rows, dim=1).view(items, 2, 3)
    grid = F.affine_grid(matrix, [items, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(drawings[:, None], grid, align_corners=False)
