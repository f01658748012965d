"""Drawn images with several objects: shapes of several classes, colours and sizes that cover one another.

Later shapes lie on earlier ones, and a mask is the part that can be seen. An image depends on its index and the seed
alone. `write_shapes` writes the same images as a COCO folder.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slope_compile.artifacts import storage_errors
from slope_compile.train.detection.masks import Bitmap, run_lengths

CLASSES = ("circle", "square", "triangle", "star", "ring")
MOST = 4  # shapes drawn in one image
EMPTY = 1 / 16  # share of images without any
RADIUS = (0.14, 0.30)  # of the image's side
VISIBLE = 0.3  # of a shape: what is covered further is no object any more

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """What can be seen of one shape.

    Attributes:
        label: 1 to len(CLASSES).
        mask: uint8 [size, size].
    """

    label: int
    mask: Bitmap

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1: the mask's extent, the last pixel included."""
        rows, columns = np.flatnonzero(self.mask.any(axis=1)), np.flatnonzero(self.mask.any(axis=0))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def draw_shapes(index: int, size: int, seed: int = 0) -> tuple[Pixels, list[Shape]]:
    """Draw one image.

    Args:
        index: Which; each is another image.
        size: Side in pixels.
        seed: Of the whole set.

    Returns:
        The image, uint8 [size, size, 3], and its shapes.
    """
    draw = np.random.Generator(np.random.PCG64([seed, index]))
    y, x = np.mgrid[0:size, 0:size] / size  # [size, size] each, 0 to 1
    image = _background(draw, x, y)
    count = 0 if draw.random() < EMPTY else int(draw.integers(1, MOST + 1))
    covered: list[tuple[int, npt.NDArray[np.bool_], int]] = []  # label, visible part, whole area
    for _ in range(count):
        label = int(draw.integers(len(CLASSES))) + 1
        whole = _outline(draw, label, x, y)
        colour = draw.random(3)
        image[whole] = 0.85 * colour + 0.15 * image[whole]
        covered = [(other, visible & ~whole, area) for other, visible, area in covered]
        covered.append((label, whole, int(whole.sum())))
    noise = draw.normal(0, 0.03, image.shape)
    pixels = ((image + noise).clip(0, 1) * 255).round().astype(np.uint8)
    seen = [(label, visible) for label, visible, area in covered if visible.sum() >= max(1, VISIBLE * area)]
    return pixels, [Shape(label, visible.astype(np.uint8)) for label, visible in seen]


def write_shapes(folder: Path | str, items: int, size: int, seed: int = 0, validation: float = 0.2) -> None:
    """Write a COCO folder: annotations/instances_{train,val}.json, and train/ and val/ with PNG files.

    `data.source: coco:FOLDER` then gives the same images and objects as `shapes:ITEMS` with the same share and seed 0.

    Args:
        folder: Made where it is missing.
        items: Images in all.
        size: Side in pixels.
        seed: Of the set.
        validation: Share of the images that goes to val/.

    Raises:
        StorageError: If the disk refuses.
    """
    held = held_out(items, validation)
    sides = {"train": range(items - held), "val": range(items - held, items)}
    with storage_errors(Path(folder)):
        (Path(folder) / "annotations").mkdir(parents=True, exist_ok=True)
        for name, indices in sides.items():
            (Path(folder) / name).mkdir(exist_ok=True)
            document: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": _categories()}
            for index in indices:
                pixels, shapes = draw_shapes(index, size, seed)
                file = f"{index:06}.png"
                Image.fromarray(pixels).save(Path(folder) / name / file)
                document["images"].append({"id": index, "file_name": file, "width": size, "height": size})
                for shape in shapes:
                    document["annotations"].append(_annotation(len(document["annotations"]) + 1, index, shape))
            text = json.dumps(document)
            (Path(folder) / "annotations" / f"instances_{name}.json").write_text(text, encoding="utf-8")


def held_out(items: int, share: float) -> int:
    """Return how many of the items, the last ones, are held out: at least one, and not all."""
    return min(max(round(items * share), 1), items - 1)


def _categories() -> list[dict[str, Any]]:
    return [{"id": label, "name": name} for label, name in enumerate(CLASSES, 1)]


def _annotation(number: int, image: int, shape: Shape) -> dict[str, Any]:
    x0, y0, x1, y1 = shape.box
    return {
        "id": number,
        "image_id": image,
        "category_id": shape.label,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(shape.mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(shape.mask.shape), "counts": run_lengths(shape.mask)},
    }


def _background(draw: np.random.Generator, x: Any, y: Any) -> npt.NDArray[np.float64]:
    """Return a gradient of two colours under two gratings, [size, size, 3]."""
    first, second = 0.25 + 0.5 * draw.random((2, 3))
    angle, waves = 2 * math.pi * draw.random(3), 4 + 12 * draw.random(2)
    slope = (x * math.cos(angle[0]) + y * math.sin(angle[0]) + 1) / 3
    pairs = zip(waves, angle[1:], strict=True)
    grating = sum(np.sin(2 * math.pi * w * (x * math.cos(a) + y * math.sin(a))) for w, a in pairs)
    image: npt.NDArray[np.float64] = first + slope[..., None] * (second - first) + 0.05 * grating[..., None]
    return image


def _outline(draw: np.random.Generator, label: int, x: Any, y: Any) -> npt.NDArray[np.bool_]:
    """Return which pixels a shape of random place, size and angle covers, [size, size]; its centre is in the image."""
    radius = draw.uniform(*RADIUS)
    centre, turn = draw.uniform(radius / 2, 1 - radius / 2, 2), 2 * math.pi * draw.random()
    dx, dy = x - centre[0], y - centre[1]
    distance, angle = np.hypot(dx, dy), np.arctan2(dy, dx) + turn
    name = CLASSES[label - 1]
    inside: npt.NDArray[np.bool_]
    if name == "circle":
        inside = distance < radius
    elif name == "ring":
        inside = (distance < radius) & (distance > 0.55 * radius)
    elif name == "star":  # five points: the radius swings between the tip and 40 % of it
        phase = np.abs((angle * 5 / (2 * math.pi)) % 1 - 0.5) * 2  # 1 at a tip, 0 between two
        inside = distance < radius * (0.4 + 0.6 * phase)
    else:  # a regular polygon: the distance to its nearest side is at most its inradius
        half = math.pi / (3 if name == "triangle" else 4)
        inside = distance * np.cos((angle + half) % (2 * half) - half) < radius * math.cos(half)
    return inside
