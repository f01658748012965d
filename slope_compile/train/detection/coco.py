"""COCO annotation files: read with every number checked, because a wrong box trains silently.

What is wrong with the file as a whole (structure, ids, unknown categories) is refused. What is wrong with one box, mask
or image is refused too, or with data.bad_images: skip left out and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from slope_compile.errors import DataError
from slope_compile.train.detection.masks import Segmentation, is_number, parse_segmentation
from slope_compile.train.images import MAX_PIXELS
from slope_compile.train.sources import CocoSplit

MAX_ANNOTATION_BYTES = 2_000_000_000  # COCO's own training file has 450 million
TOLERANCE = 1.0  # pixels that a box may stick out of its image, as rounded boxes do; it is clipped
SHOWN = 3  # damaged annotations named in an error
REMEDY = "Mend the annotation file."


@dataclass(frozen=True)
class CocoObject:
    """One annotation.

    Attributes:
        label: 1 to the number of classes; 0 is the background.
        box: x0, y0, x1, y1 in pixels of the file's image.
        segmentation: Its outline, or None where the set has boxes only.
        crowd: A region of many objects: not learnt from, and neither right nor wrong to detect.
    """

    label: int
    box: tuple[float, float, float, float]
    segmentation: Segmentation | None
    crowd: bool


@dataclass(frozen=True)
class CocoImage:
    """One image with what is to be found in it, maybe nothing."""

    path: str
    width: int
    height: int
    objects: tuple[CocoObject, ...]


@dataclass(frozen=True)
class CocoSet:
    """A split: categories in the order of their labels (id -> name), images, and annotation -> why it was left out."""

    categories: Mapping[int, str]
    images: tuple[CocoImage, ...]
    skipped: Mapping[str, str]


def read_coco(split: CocoSplit, skip: bool) -> CocoSet:
    """Read and check one annotation file.

    Args:
        split: The file, and where its images are.
        skip: Leave damaged annotations out instead of refusing them.

    Raises:
        DataError: Naming the file, the annotation or image, and what is wrong with it.
    """
    document = _read(split.annotations)
    categories = _categories(document["categories"], split.annotations)
    labels = {category: label for label, category in enumerate(categories, 1)}
    rows = {row["id"]: row for row in _images(document["images"], split.annotations)}
    objects: dict[int, list[CocoObject]] = {image: [] for image in rows}
    skipped: dict[str, str] = {}
    seen: set[int] = set()
    for raw in document.pop("annotations"):
        number = _id(raw, "annotation", split.annotations, seen)
        image = _known(raw, "image_id", rows, number, split.annotations)
        category = _known(raw, "category_id", labels, number, split.annotations)
        try:
            objects[image].append(_object(raw, labels[category], rows[image]))
        except ValueError as error:
            skipped[f"{split.annotations}: annotation {number}"] = str(error)
    if skipped and not skip:
        named = "; ".join(f"{where}: {why}" for where, why in list(skipped.items())[:SHOWN])
        raise DataError(
            f"{len(skipped)} of {len(seen)} annotations are not usable: {named}.",
            "Mend or remove them, or set data.bad_images: skip.",
        )
    images = tuple(
        CocoImage(f"{split.images}/{row['file_name']}", row["width"], row["height"], tuple(objects[image]))
        for image, row in rows.items()
    )
    return CocoSet(categories, images, skipped)


def _read(path: Path) -> dict[str, list[Any]]:
    try:
        size = path.stat().st_size
        if size > MAX_ANNOTATION_BYTES:
            raise DataError(f"{path} is {size} bytes; at most {MAX_ANNOTATION_BYTES} are read.", "Is it another file?")
        with path.open("rb") as file:
            document: dict[str, list[Any]] = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} is not JSON that can be read: {reason}.", REMEDY) from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(f"{path} is no COCO annotation file: it has no list of '{key}'.", REMEDY)
    return document


def _categories(rows: Iterable[Any], path: Path) -> dict[int, str]:
    """Return id -> name, in the order of the ids: whatever their order in the file, labels are the same."""
    found: dict[int, str] = {}
    seen: set[int] = set()
    for row in rows:
        number = _id(row, "category", path, seen)
        name = row.get("name")
        if not isinstance(name, str) or not name or name in found.values():
            raise DataError(f"{path}: category {number} has the name {name!r}: empty, or not its own.", REMEDY)
        found[number] = name
    if not found:
        raise DataError(f"{path} names no category.", REMEDY)
    return dict(sorted(found.items()))


def _images(rows: Iterable[Any], path: Path) -> Iterable[Mapping[str, Any]]:
    seen: set[int] = set()
    files: set[str] = set()
    for row in rows:
        number = _id(row, "image", path, seen)
        name = row.get("file_name")
        if not isinstance(name, str) or not _is_inside(name):
            raise DataError(f"{path}: image {number} has the file name {name!r}, not one below its folder.", REMEDY)
        if name in files:
            raise DataError(f"{path}: image {number} names the file {name!r}, as another image does.", REMEDY)
        width, height = row.get("width"), row.get("height")
        if not _is_size(width) or not _is_size(height) or width * height > MAX_PIXELS:
            raise DataError(f"{path}: image {number} has size {width!r} x {height!r}.", REMEDY)
        files.add(name)
        yield {"id": number, "file_name": name, "width": width, "height": height}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return name.isprintable() and bool(path.parts) and not path.is_absolute() and not {"..", "~"} & set(path.parts)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _id(row: Any, what: str, path: Path, seen: set[int]) -> int:
    number = row.get("id") if isinstance(row, dict) else None
    if not isinstance(number, int) or isinstance(number, bool):
        raise DataError(f"{path}: a row of {what} has the id {number!r}, no whole number.", REMEDY)
    if number in seen:
        raise DataError(f"{path}: the {what} id {number} occurs twice.", REMEDY)
    seen.add(number)
    return number


def _known(row: Mapping[str, Any], key: str, known: Mapping[int, Any], number: int, path: Path) -> int:
    value = row.get(key)
    if not isinstance(value, int) or value not in known:
        what = key.removesuffix("_id")
        raise DataError(
            f"{path}: annotation {number} is of {what} {value!r}, which the file does not list.",
            f"Add the {what} to the file, or remove the annotation.",
        )
    return value


def _object(raw: Mapping[str, Any], label: int, image: Mapping[str, Any]) -> CocoObject:
    """Return one annotation; ValueError says what is wrong with it."""
    height, width = image["height"], image["width"]
    crowd = raw.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd is {crowd!r}, neither 0 nor 1")
    segmentation = raw.get("segmentation")
    # Sets with boxes only leave the key out, or the list in it empty.
    outline = None if segmentation in (None, []) else parse_segmentation(segmentation, height, width)
    return CocoObject(label, _box(raw.get("bbox"), height, width), outline, bool(crowd))


def _box(raw: Any, height: int, width: int) -> tuple[float, float, float, float]:
    if not isinstance(raw, list) or len(raw) != 4 or not all(is_number(value) for value in raw):
        raise ValueError(f"its box is {raw!r:.80}, not x, y, width, height")
    x, y, w, h = (float(value) for value in raw)
    if w <= 0 or h <= 0:
        raise ValueError(f"its box {raw} has no area")
    if x < -TOLERANCE or y < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        raise ValueError(f"its box {raw} is not inside its image of {width} x {height} pixels")
    box = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"its box {raw} has no area inside its image of {width} x {height} pixels")
    return box
