from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import MultiScaleRoIAlign

from slope_compile.export.detection.pooling import pool, pyramid

SIDE = 128
SIZES = (32, 16, 8, 4)


def features(batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 5, side, side, generator=generator) for side in SIZES]


def both(boxes: torch.Tensor, output: int = 7, ratio: int = 2, count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and torchvision's: [2, P, 4] -> [2·P, 5, output, output]."""
    given = features()[:count]
    theirs = MultiScaleRoIAlign([str(i) for i in range(count)], output, ratio)
    named = OrderedDict((str(i), f) for i, f in enumerate(given))
    ours = pool(given, boxes, pyramid(SIZES[:count], SIDE, output, ratio, 224, 4))
    return ours, theirs(named, list(boxes), [(SIDE, SIDE)] * 2)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([(7, 2), (14, 2), (3, 1), (2, 3)]), st.integers(1, 4))
def test_any_boxes_are_pooled_as_torchvision_does(seed: int, shape: tuple[int, int], count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, 12, 2, 2, generator=generator) * SIDE * 1.05  # some reach over the edge
    boxes = torch.cat([corners.amin(2), corners.amax(2)], -1)
    ours, theirs = both(boxes, *shape, count)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 0, 0), (128, 128, 128, 128), (127.9, 3, 128, 4), (0, 0, 128, 128), (-1, -1, 5, 5), (5, 5, 5, 60),
        (0, 0, 112, 112), (0, 0, 111.9999, 111.9999), (0, 0, 56, 56), (0, 0, 56.0001, 56), (60, 60, 60.5, 60.5),
    ],
)  # fmt: skip
def test_boxes_at_the_edges_and_between_levels(box: tuple[float, ...]) -> None:
    ours, theirs = both(torch.tensor([[box], [box]], dtype=torch.float32))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_levels_are_those_of_the_paper() -> None:
    """Lin et al. 2017, eq. 1: 224 pixels belong to level 4, the third of four from stride 4 on."""
    levels = pyramid((200, 100, 50, 25), 800, 7, 2, 224, 4)
    assert levels.scales == (1 / 4, 1 / 8, 1 / 16, 1 / 32)
    assert levels.smallest == pytest.approx((112, 224, 448), rel=1e-5)
    assert all(size <= whole for size, whole in zip(levels.smallest, (112, 224, 448), strict=True))
