"""Masks of boxes put into their image, on the host: numpy alone, so that a program with an engine can have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

PADDING = 1  # pixels of zeros around a mask before it is stretched: torchvision.models.detection.roi_heads


def paste_masks(masks: npt.NDArray[Any], boxes: npt.NDArray[Any], height: int, width: int) -> npt.NDArray[np.float32]:
    """Return each mask as an image, as torchvision's paste_masks_in_image does; 0.5 is its usual threshold.

    Args:
        masks: [detections, side, side], probabilities inside the box.
        boxes: [detections, 4], x1, y1, x2, y2 in pixels.
        height: Of the image.
        width: Of the image.

    Returns:
        float32 [detections, height, width].
    """
    pasted = np.zeros((len(masks), height, width), np.float32)
    for image, mask, box in zip(pasted, masks, boxes, strict=True):
        side = mask.shape[-1]
        padded = np.pad(mask.astype(np.float32), PADDING)
        x1, y1, x2, y2 = _grown(box.astype(np.float32), np.float32((side + 2 * PADDING) / side))
        wide, high = max(x2 - x1 + 1, 1), max(y2 - y1 + 1, 1)
        rows = slice(max(y1, 0), max(min(y2 + 1, height), 0))
        columns = slice(max(x1, 0), max(min(x2 + 1, width), 0))
        down = _stretch(len(padded), high, np.arange(rows.start, rows.stop) - y1)
        across = _stretch(len(padded), wide, np.arange(columns.start, columns.stop) - x1)
        image[rows, columns] = down @ padded @ across.T
    return pasted


def _grown(box: npt.NDArray[np.float32], scale: np.float32) -> tuple[int, int, int, int]:
    """Return a box grown about its centre, corners cut down to whole pixels (towards zero, as torch's cast does)."""
    half = (box[2:] - box[:2]) * np.float32(0.5) * scale
    centre = (box[2:] + box[:2]) * np.float32(0.5)
    (x1, y1), (x2, y2) = (int(v) for v in centre - half), (int(v) for v in centre + half)
    return x1, y1, x2, y2


def _stretch(side: int, length: int, at: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the weights, [positions, side], of bilinear interpolation from `side` pixels to `length` at positions."""
    # pixel centres are aligned (align_corners=False): source = (target + 1/2) · side / length - 1/2, not below 0
    source = np.maximum((at + np.float32(0.5)) * np.float32(side / length) - np.float32(0.5), 0).astype(np.float32)
    below = np.minimum(source.astype(np.int64), side - 1)
    above = np.minimum(below + 1, side - 1)
    upper = source - below
    weights = np.zeros((len(at), side), np.float32)
    np.add.at(weights, (np.arange(len(at)), below), 1 - upper)
    np.add.at(weights, (np.arange(len(at)), above), upper)
    return weights
