"""Detection data: images of one size with boxes, labels and masks, the same for each (seed, epoch, index).

The longer side of an image becomes `size`; the rest is padded at the right and the bottom with the mean colour.
Transforms are torchvision's v2, which move boxes and masks along with the image.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from slope_compile.errors import DataError, RecipeError
from slope_compile.recipe import DataSection
from slope_compile.train.data import MEAN, SPLIT_SEED, STD, Data, mix
from slope_compile.train.detection.coco import CocoImage, CocoSet, read_coco
from slope_compile.train.detection.masks import draw
from slope_compile.train.detection.shapes import CLASSES, draw_shapes, held_out
from slope_compile.train.images import FORMATS, decode, undecodable
from slope_compile.train.sources import CocoFolder, find_coco, image_file, parse_source

JITTER = (0.75, 1.25)  # of the scale, with data.augment: light
SMALLEST = 1.0  # pixels: what is left of an object at the border and is thinner is no object any more
SHOWN = 3

Target = dict[str, Tensor]
Item = tuple[Tensor, Target]


@dataclass(frozen=True)
class Scene:
    """One image before any transform, and what is in it.

    Attributes:
        image: RGB.
        boxes: Float32 [k, 4], x0, y0, x1, y1.
        labels: Int64 [k], from 1 on.
        crowd: Int64 [k], 1 for a region of many objects.
        masks: Uint8 [k, height, width]; None where the set has boxes only.
    """

    image: Image.Image
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    masks: Tensor | None


class Scenes(Protocol):
    """Where scenes come from; `masks` tells whether objects have them."""

    masks: bool

    def read(self, index: int) -> Scene:
        """Return one scene; DataError if its image has changed since it was checked."""
        ...


class DetectionDataset(Dataset[Item]):
    """Some scenes of a source, transformed.

    Args:
        scenes: The source.
        indices: Which of them.
        section: The recipe's data section.
        train: Whether to augment, and to leave crowds out.
        seed: Of the augmentation.
    """

    def __init__(self, scenes: Scenes, indices: Sequence[int], section: DataSection, train: bool, seed: int) -> None:
        self._scenes, self._indices, self._size = scenes, list(indices), section.size
        self._train, self._seed, self._epoch = train, seed, 0
        self._transform = _transform(section.size, train and section.augment == "light")

    @property
    def masks(self) -> bool:
        """Whether objects have masks."""
        return self._scenes.masks

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation's random draws; call it before the workers start."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Item:
        """Return the image, float32 [3, size, size], and its target.

        The target has `boxes` float32 [k, 4] (x0, y0, x1, y1), `labels` int64 [k], `iscrowd` int64 [k], `area` float32
        [k] in pixels and, where the set has them, `masks` uint8 [k, size, size].
        """
        scene = self._scenes.read(self._indices[index])
        # torchvision draws from torch's global generator: lend it a seed of this item's own, whoever runs it.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(mix(self._seed, self._epoch, index))
        try:
            return self._target(scene)
        finally:
            generator.set_state(state)

    def _target(self, scene: Scene) -> Item:
        size = (scene.image.height, scene.image.width)
        sample: dict[str, Any] = {
            "image": tv_tensors.Image(v2.functional.pil_to_tensor(scene.image)),
            "boxes": tv_tensors.BoundingBoxes(scene.boxes, format="XYXY", canvas_size=size),
        }
        if scene.masks is not None:
            sample["masks"] = tv_tensors.Mask(scene.masks)
        sample = self._transform(sample)
        boxes, labels, crowd = sample["boxes"].as_subclass(Tensor), scene.labels, scene.crowd
        masks = sample["masks"].as_subclass(Tensor) if scene.masks is not None else None
        keep = (boxes[:, 2:] - boxes[:, :2] >= SMALLEST).all(dim=1)
        if masks is not None:
            keep &= (masks.flatten(1) > 0).any(dim=1)
        if self._train:
            keep &= crowd == 0
        target = {"boxes": boxes[keep], "labels": labels[keep], "iscrowd": crowd[keep]}
        if masks is not None:
            target["masks"] = masks[keep]
            target["area"] = target["masks"].flatten(1).sum(dim=1).float()
        else:
            target["area"] = (target["boxes"][:, 2:] - target["boxes"][:, :2]).prod(dim=1)
        return sample["image"].as_subclass(Tensor), target


def load_detection(section: DataSection, seed: int) -> Data:
    """Open a `coco:DIR` or `shapes:N` source and split it.

    Raises:
        DataError: If the source is not usable (see `read_coco`), or with bad_images: refuse one of its images.
        RecipeError: If data.augment or data.size does not fit detection.
    """
    if section.augment == "imagenet":
        raise RecipeError(
            "data.augment: imagenet crops an image down to one object: it is for classification.",
            "Set data.augment: light or none.",
        )
    source = parse_source(section.source)
    if source.kind == "shapes":
        first = source.items - held_out(source.items, section.validation)
        drawn = DrawnScenes(section.size)
        train, validation = range(first), range(first, source.items)
        return _data(section, seed, (drawn, train), (drawn, validation), list(CLASSES), {})
    splits, classes, skipped = _read_folder(find_coco(source.folder), section)
    if len(splits) == 2:
        sides = [(FileScenes(images), range(len(images))) for images in splits]
        return _data(section, seed, sides[0], sides[1], classes, skipped)
    scenes, order = FileScenes(splits[0]), _shuffled(len(splits[0]))
    held = held_out(len(order), section.validation)
    return _data(section, seed, (scenes, sorted(order[held:])), (scenes, sorted(order[:held])), classes, skipped)


def _data(
    section: DataSection,
    seed: int,
    train: tuple[Scenes, Sequence[int]],
    validation: tuple[Scenes, Sequence[int]],
    classes: list[str],
    skipped: dict[str, str],
) -> Data:
    sides = [
        DetectionDataset(*side, section, is_train, seed) for side, is_train in ((train, True), (validation, False))
    ]
    return Data(sides[0], sides[1], classes, section.source, skipped, kind="detection")


class DrawnScenes:
    """The scenes of `shapes:N`."""

    masks = True

    def __init__(self, size: int) -> None:
        self._size = size

    def read(self, index: int) -> Scene:
        """Draw one scene."""
        pixels, shapes = draw_shapes(index, self._size)
        masks = np.stack([shape.mask for shape in shapes]) if shapes else np.zeros((0, self._size, self._size), "uint8")
        return Scene(
            Image.fromarray(pixels),
            _boxes(shape.box for shape in shapes),
            torch.tensor([shape.label for shape in shapes], dtype=torch.int64),
            torch.zeros(len(shapes), dtype=torch.int64),
            torch.from_numpy(masks),
        )


class FileScenes:
    """The scenes of a COCO folder."""

    def __init__(self, images: Sequence[CocoImage]) -> None:
        self._images = images
        self.masks = any(found.segmentation is not None for image in images for found in image.objects)

    def read(self, index: int) -> Scene:
        """Decode one image and draw its masks."""
        row = self._images[index]
        image = decode(row.path)
        if image.size != (row.width, row.height):
            raise DataError(f"{row.path}: {_other_size(image.size, row)}.", "Mend the annotation file.")
        masks = [draw(o.segmentation, row.height, row.width) for o in row.objects if o.segmentation is not None]
        empty = np.zeros((0, row.height, row.width), dtype=np.uint8)
        return Scene(
            image,
            _boxes(found.box for found in row.objects),
            torch.tensor([found.label for found in row.objects], dtype=torch.int64),
            torch.tensor([int(found.crowd) for found in row.objects], dtype=torch.int64),
            torch.from_numpy(np.stack(masks) if masks else empty) if self.masks else None,
        )


def _boxes(boxes: Iterable[tuple[float, float, float, float]]) -> Tensor:
    return torch.tensor(list(boxes), dtype=torch.float32).reshape(-1, 4)


def _transform(size: int, augment: bool) -> v2.Compose:
    fill = {tv_tensors.Image: [round(255 * mean) for mean in MEAN], "others": 0}
    if augment:
        place = [
            v2.RandomHorizontalFlip(),
            v2.ScaleJitter((size, size), JITTER, antialias=True),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
        ]
    else:
        place = [v2.Resize(None, max_size=size, antialias=True), _PadTo(size, fill)]
    return v2.Compose([*place, v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), _Normalize()])


class _PadTo(v2.Transform):
    """Pads at the right and the bottom up to size x size."""

    def __init__(self, size: int, fill: dict[Any, Any]) -> None:
        super().__init__()
        self._size, self._fill = size, fill

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad one of image, boxes, masks."""
        height, width = v2.functional.get_size(inpt)
        fill = self._fill[tv_tensors.Image] if isinstance(inpt, tv_tensors.Image) else 0
        return v2.functional.pad(inpt, [0, 0, self._size - width, self._size - height], fill=fill)


class _Normalize(v2.Transform):
    """Normalizes the image."""

    _transformed_types = (tv_tensors.Image,)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Subtract ImageNet's mean and divide by its deviation."""
        return v2.functional.normalize(inpt, list(MEAN), list(STD))


def _shuffled(items: int) -> list[int]:
    return sorted(range(items), key=lambda index: (mix(SPLIT_SEED, index), index))


def _read_folder(
    folder: CocoFolder, section: DataSection
) -> tuple[list[tuple[CocoImage, ...]], list[str], dict[str, str]]:
    """Return the images of each split, the class names, and what was left out."""
    skip = section.bad_images == "skip"
    found = [read_coco(split, skip) for split in (folder.train, folder.validation) if split is not None]
    _refuse_other_categories(found, folder)
    _refuse_missing_masks(found, section)
    skipped = {where: why for part in found for where, why in part.skipped.items()}
    splits = []
    for part, split in zip(found, (folder.train, folder.validation), strict=False):
        bad = _bad_images(part.images, section.size)
        if bad and not skip:
            named = "; ".join(f"{path}: {why}" for path, why in list(bad.items())[:SHOWN])
            raise DataError(
                f"{len(bad)} of {len(part.images)} images are not usable: {named}.",
                "Replace or remove them, or set data.bad_images: skip.",
            )
        skipped |= bad
        images = tuple(image for image in part.images if image.path not in bad)
        if not any(not found.crowd for image in images for found in image.objects):
            where = split.annotations if split is not None else section.source
            raise DataError(f"{where} has no usable annotation.", "Check that it is the right file.")
        splits.append(images)
    return splits, list(found[0].categories.values()), skipped


def _refuse_other_categories(found: Sequence[CocoSet], folder: CocoFolder) -> None:
    if len(found) == 2 and dict(found[0].categories) != dict(found[1].categories):
        unlike = sorted(set(found[0].categories.items()) ^ set(found[1].categories.items()))[:SHOWN]
        named = ", ".join(f"{number} {name!r}" for number, name in unlike)
        files = f"{folder.train.annotations} and {folder.validation and folder.validation.annotations}"
        raise DataError(f"The categories of {files} differ: {named}.", "Give both files the same categories.")


def _refuse_missing_masks(found: Sequence[CocoSet], section: DataSection) -> None:
    """Raise where some objects have a mask and others none: they could be learnt neither with nor without."""
    counts = [0, 0]
    for image in (image for part in found for image in part.images):
        for annotation in image.objects:
            counts[annotation.segmentation is not None] += 1
    if all(counts):
        raise DataError(
            f"{section.source}: {counts[0]} of {sum(counts)} annotations have no segmentation.",
            "Give every annotation one, or none.",
        )


def _bad_images(images: Sequence[CocoImage], size: int) -> dict[str, str]:
    """Return path -> reason for the images that do not decode, are of another size than the file says, or too thin."""
    bad = dict(undecodable(tuple(image_file(image.path) for image in images)))
    decodable = [image for image in images if image.path not in bad]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sizes = list(pool.map(_size, [image.path for image in decodable]))
    unlike = {
        image.path: _other_size(found, image)
        for image, found in zip(decodable, sizes, strict=True)
        if found != (image.width, image.height)
    }
    thin = {
        image.path: f"{image.width} x {image.height} pixels: nothing is left of one side at data.size {size}"
        for image in decodable
        if JITTER[0] * size * min(image.width, image.height) < max(image.width, image.height)
    }
    return bad | thin | unlike


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            return width, height
    except OSError:  # it decoded a moment ago
        return 0, 0


def _other_size(size: tuple[int, int], image: CocoImage) -> str:
    return f"{size[0]} x {size[1]} pixels, but its annotations are for {image.width} x {image.height}"
