from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.roi_heads import paste_masks_in_image

from slope_compile.export.detection import paste_masks


def both(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    theirs = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0].numpy()
    return paste_masks(masks.numpy(), boxes.numpy(), height, width), theirs


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(8, 70), st.integers(8, 70), st.sampled_from([28, 14]))
def test_masks_are_pasted_as_torchvision_does(seed: int, height: int, width: int, side: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(4, 2, 2, generator=generator) * torch.tensor([width, height])
    boxes = torch.cat([corners.amin(1), corners.amax(1)], -1)
    ours, theirs = both(torch.rand(4, side, side, generator=generator), boxes, height, width)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("box", [(0, 0, 32, 24), (31.5, 23.5, 32, 24), (3, 3, 3, 3), (0, 0, 0.4, 24)])
def test_boxes_at_the_edge(box: tuple[float, ...]) -> None:
    ours, theirs = both(torch.rand(1, 28, 28), torch.tensor([box], dtype=torch.float32), 24, 32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_nothing_found_gives_no_masks() -> None:
    assert paste_masks(np.zeros((0, 28, 28)), np.zeros((0, 4)), 5, 6).shape == (0, 5, 6)
