"""COCO's segmentations as bitmaps: polygons, and run-length codes, plain or packed into text.

Run lengths count the mask's pixels down the columns, alternating between 0s and 1s, 0s first. Text packs each count
(from the third on: its difference to the one before the last) into characters of 5 bits, low bits first, offset 48.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

Bitmap = npt.NDArray[np.uint8]  # [height, width], 0 or 1
Counts = npt.NDArray[np.int64]
Segmentation = tuple[npt.NDArray[np.float64], ...] | Counts  # polygons x0 y0 x1 y1 …, or run lengths
MAX_COUNTS = 10_000_000  # run lengths of one object
LARGEST = 1e9  # of a coordinate; NaN and infinity are not below it either
MAX_DIGITS = 7  # characters of one packed run length: 35 bits


def parse_segmentation(raw: Any, height: int, width: int) -> Segmentation:
    """Check a `segmentation` of an annotation file.

    Args:
        raw: A list of polygons, or {"size": [height, width], "counts": run lengths or text}.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Raises:
        ValueError: Saying what is wrong.
    """
    if isinstance(raw, Mapping):
        return _run_lengths(raw, height, width)
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"its segmentation is {_kind(raw)}, neither polygons nor run lengths")
    return tuple(_polygon(part, height, width) for part in raw)


def draw(segmentation: Segmentation, height: int, width: int) -> Bitmap:
    """Return the bitmap of a parsed segmentation."""
    if isinstance(segmentation, tuple):
        outlines = coco_mask.frPyObjects([polygon.tolist() for polygon in segmentation], height, width)
        segmentation = np.asarray(_unpack(coco_mask.merge(outlines)["counts"].decode()), dtype=np.int64)
    values = np.arange(len(segmentation), dtype=np.uint8) & 1
    return np.ascontiguousarray(np.repeat(values, segmentation).reshape(width, height).T)


def run_lengths(bitmap: Bitmap) -> list[int]:
    """Return the run lengths of a bitmap."""
    flat = np.concatenate([[0], bitmap.T.reshape(-1)])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(count) for count in np.diff(np.concatenate([[0], edges, [bitmap.size]]))]


def _polygon(part: Any, height: int, width: int) -> npt.NDArray[np.float64]:
    if not isinstance(part, list) or len(part) < 6 or len(part) % 2:
        raise ValueError(f"a polygon of its segmentation is {_kind(part)}, not x, y of three points or more")
    if not all(is_number(value) for value in part):
        raise ValueError("a polygon of its segmentation holds something that is no finite number")
    points = np.asarray(part, dtype=np.float64)
    points[0::2] = points[0::2].clip(0, width)  # the drawing itself checks nothing
    points[1::2] = points[1::2].clip(0, height)
    return points


def _run_lengths(raw: Mapping[str, Any], height: int, width: int) -> Counts:
    if raw.get("size") != [height, width]:
        raise ValueError(f"its mask has size {raw.get('size')!r}, its image [{height}, {width}]")
    given = raw.get("counts")
    counts = _unpack(given) if isinstance(given, str) else given
    if not isinstance(counts, list) or len(counts) > MAX_COUNTS:
        raise ValueError(f"its run lengths are {_kind(given)}, neither a list nor text")
    if not all(isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= 2**40 for count in counts):
        raise ValueError("its run lengths hold something that is no count of pixels")
    if sum(counts) != height * width:
        raise ValueError(f"its run lengths sum to {sum(counts)}, its image has {height} x {width} pixels")
    return np.asarray(counts, dtype=np.int64)


def _unpack(text: str) -> list[int]:
    counts: list[int] = []
    value = digits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or digits == MAX_DIGITS:
            raise ValueError("its packed run lengths are damaged")
        value |= (code & 31) << (5 * digits)
        digits += 1
        if code & 32:  # more digits follow
            continue
        if code & 16:  # negative
            value -= 1 << (5 * digits)
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = digits = 0
    if digits:
        raise ValueError("its packed run lengths are cut off")
    return counts


def is_number(value: Any) -> bool:
    """Say whether a JSON value is a finite number."""
    # The bound is for JSON's whole numbers, which may be too large for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _kind(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)[:40]
