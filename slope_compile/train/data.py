"""Data sets: images as float32 [3, size, size] with labels, the same for each (seed, epoch, index) on any machine.

Transforms are torchvision's v2. The validation split depends on the source alone, never on the training seed.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode, v2

from slope_compile.errors import DataError
from slope_compile.recipe import DataSection, ModelSection
from slope_compile.train.images import decode, to_check, undecodable
from slope_compile.train.sources import FAKE_CLASSES, ImageFile, TaskKind, list_folder, parse_source

if TYPE_CHECKING:
    from slope_compile.train.detection.dataset import DetectionDataset

# ImageNet's statistics, for every source: what the pretrained models of torchvision and most of timm expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVAL_CROP = 0.875  # of the resized side, for models that learn from random crops
SPLIT_SEED = 0
MAX_REPLACED = 100  # images in a row that may be broken
MEND = "Replace or remove the broken images."


class Images(Protocol):
    """Images with labels, before any transform."""

    labels: Sequence[int]

    def read(self, index: int) -> Image.Image | Tensor:
        """Return a PIL image, or uint8 [3, H, W]."""
        ...


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Some images of a source, transformed.

    Args:
        images: The source.
        indices: Which of its images.
        transform: From PIL image or uint8 tensor to float32 [3, size, size].
        seed: Of the augmentation.
        replace: Whether an image that does not decode gives way to the next one that does, the same on every rank and
            after a resume; otherwise reading it raises.
    """

    def __init__(
        self, images: Images, indices: Sequence[int], transform: v2.Compose, seed: int, replace: bool = False
    ) -> None:
        self._images, self._transform, self._seed, self._replace = images, transform, seed, replace
        # Not a list: counting references to a million numbers would copy its pages in every data worker.
        self._indices = array("q", indices)
        self._epoch = 0
        self._replaced: list[str] = []

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation's random draws; call it before the workers start."""
        self._epoch = epoch

    @property
    def labels(self) -> list[int]:
        """Labels in item order, without reading an image."""
        return [self._images.labels[i] for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        position, image = self._read(index)
        # torchvision draws from torch's global generator: lend it a seed of this item's own, whoever runs it.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(mix(self._seed, self._epoch, index))
        try:
            return self._transform(image), self._images.labels[position]
        finally:
            generator.set_state(state)

    def take_replaced(self) -> list[str]:
        """Return what was wrong with each image replaced since the last call, in this process."""
        told, self._replaced = self._replaced, []
        return told

    def _read(self, index: int) -> tuple[int, Image.Image | Tensor]:
        for offset in range(MAX_REPLACED):
            position = self._indices[(index + offset) % len(self)]
            try:
                return position, self._images.read(position)
            except DataError as error:
                if not self._replace:
                    raise
                self._replaced.append(error.problem)
        raise DataError(f"{MAX_REPLACED} images in a row do not decode; the last: {self._replaced[-1]}", MEND)


@dataclass(frozen=True)
class Data:
    """A data set, split; `skipped` maps the images and annotations that are not usable to the reason."""

    train: ImageDataset | DetectionDataset
    validation: ImageDataset | DetectionDataset
    classes: list[str]
    source: str
    skipped: dict[str, str]
    kind: TaskKind = "classification"


def load_data(section: DataSection, seed: int, classes: int | None = None) -> Data:
    """Open a data set and split it.

    Args:
        section: The recipe's data section.
        seed: Of the augmentation; the split does not depend on it.
        classes: Of fake images, 10 if not given; every other source brings its own.

    Raises:
        DataError: If the source is unknown, missing, empty, has no classes, splits that differ, a class too small to
            split, or (with bad_images: refuse) an image that does not decode.
        RecipeError: If another key of the section does not fit the source.
    """
    source = parse_source(section.source)
    if source.task == "detection":
        from slope_compile.train.detection.dataset import load_detection

        return load_detection(section, seed)
    skipped: dict[str, str] = {}
    images: Images
    if source.kind == "imagefolder":
        images, names, train, validation, skipped = _from_folder(section)
    elif source.kind == "digits":
        images, names = DigitImages(), [str(digit) for digit in range(10)]
        train, validation = stratified_split(images.labels, section.validation, names)
    else:
        names = [f"class{k}" for k in range(classes or FAKE_CLASSES)]
        images = FakeImages(source.items, section.size, len(names))
        train, validation = stratified_split(images.labels, section.validation, names)
    return Data(
        ImageDataset(images, train, _train_transform(section), seed, replace=section.bad_images == "skip"),
        ImageDataset(images, validation, _plain_transform(section), seed),
        names,
        section.source,
        skipped,
    )


def head_classes(model: ModelSection, data: Data) -> int:
    """Return how many classes the model's head gets.

    Raises:
        DataError: If the recipe names another number than the data set has.
    """
    if model.classes is not None and model.classes != len(data.classes):
        raise DataError(
            f"model.classes is {model.classes}, but {data.source} has {len(data.classes)} classes.",
            f"Set model.classes: {len(data.classes)}, or leave it out.",
        )
    return len(data.classes)


def mix(*numbers: int) -> int:
    """Return a seed that depends on each number, 0 <= seed < 2**32; the same on every machine and version."""
    digest = hashlib.blake2b(b"".join(n.to_bytes(8, "little") for n in numbers), digest_size=4)
    return int.from_bytes(digest.digest(), "little")


def stratified_split(labels: Sequence[int], share: float, classes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Split indices into training and validation, each class in the same proportion, at least one image on each side.

    Args:
        labels: Of every item.
        share: Of each class that is held out, 0 < share < 1.
        classes: Names, for errors.

    Raises:
        DataError: If a class has a single item.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    train: list[int] = []
    validation: list[int] = []
    for label, indices in members.items():
        if len(indices) < 2:
            raise DataError(
                f"Class '{classes[label]}' has a single image, too few to hold one out.",
                "Add images, or give DIR/train and DIR/val folders.",
            )
        held = min(max(round(len(indices) * share), 1), len(indices) - 1)
        shuffled = sorted(indices, key=lambda index: (mix(SPLIT_SEED, index), index))
        validation += shuffled[:held]
        train += shuffled[held:]
    return sorted(train), sorted(validation)


class FileImages:
    """Images in files; a million paths are one block of bytes, which data workers share (see ImageDataset)."""

    def __init__(self, files: Sequence[ImageFile]) -> None:
        paths = [os.fsencode(file.path) for file in files]
        self._paths, self._ends = b"".join(paths), array("q", accumulate(map(len, paths), initial=0))
        self.labels: Sequence[int] = array("l", [file.label for file in files])

    def read(self, index: int) -> Image.Image:
        """Decode one file; DataError if it does not decode."""
        return decode(os.fsdecode(self._paths[self._ends[index] : self._ends[index + 1]]))


class DigitImages:
    """scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, 17 grey levels (load_digits)."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self._pixels = (digits.images * (255 / 16)).round().astype("uint8")  # [1797, 8, 8]
        self.labels: Sequence[int] = digits.target.tolist()

    def read(self, index: int) -> Image.Image:
        """Return one digit, grey."""
        return Image.fromarray(self._pixels[index])


class FakeImages:
    """Made-up images that can be learnt: each class has a colour and a grating, each image noise of its own.

    Where there are too few items for two of each class, the first classes have them.
    """

    def __init__(self, items: int, size: int, classes: int) -> None:
        shown = min(classes, items // 2)
        self.labels: Sequence[int] = [index % shown for index in range(items)]
        k = torch.arange(shown).view(-1, 1, 1, 1)
        hue = torch.cos(2 * math.pi * (k / shown + torch.arange(3).view(1, 3, 1, 1) / 3))  # [shown, 3, 1, 1]
        axis = torch.linspace(0, 1, size)
        angle = math.pi * k / shown
        along = axis.view(1, 1, 1, -1) * torch.cos(angle) + axis.view(1, 1, -1, 1) * torch.sin(angle)
        self._patterns = 0.5 + 0.15 * hue + 0.2 * torch.sin(4 * math.pi * along)  # [shown, 3, size, size]

    def read(self, index: int) -> Tensor:
        """Return pattern + noise, uint8 [3, size, size]."""
        pattern = self._patterns[self.labels[index]]
        noise = torch.randn(pattern.shape, generator=torch.Generator().manual_seed(mix(SPLIT_SEED, index)))
        return ((pattern + 0.15 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _from_folder(section: DataSection) -> tuple[FileImages, list[str], list[int], list[int], dict[str, str]]:
    folder = parse_source(section.source).folder
    listing = list_folder(folder)
    classes = list(listing.classes)
    files = (*listing.train, *(listing.validation or ()))
    if listing.validation is None:
        train, validation = stratified_split([file.label for file in files], section.validation, classes)
    else:
        train, validation = list(range(len(listing.train))), list(range(len(listing.train), len(files)))
    checked = to_check(files, train, validation)
    bad = undecodable(checked)
    if bad and section.bad_images == "refuse":
        named = "; ".join(f"{path}: {reason}" for path, reason in list(bad.items())[:3])
        sampled = "" if len(checked) == len(files) else f" (checked so far, of {len(files)})"
        raise DataError(
            f"{len(bad)} of {len(checked)} images{sampled} do not decode: {named}.",
            "Replace or remove them, or set data.bad_images: skip.",
        )
    train, validation = ([i for i in side if files[i].path not in bad] for side in (train, validation))
    for side, name in ((train, "training"), (validation, "validation")):
        empty = sorted(set(range(len(classes))) - {files[i].label for i in side})
        if empty:
            raise DataError(
                f"{folder}: class '{classes[empty[0]]}' has no {name} image that decodes.", "Replace the broken images."
            )
    return FileImages(files), classes, train, validation, bad


def _plain_transform(section: DataSection) -> v2.Compose:
    resized = round(section.size / EVAL_CROP) if section.augment == "imagenet" else section.size
    return v2.Compose([v2.Resize(resized), v2.CenterCrop(section.size), *_to_float()])


def _train_transform(section: DataSection) -> v2.Compose:
    size = section.size
    if section.augment == "imagenet":
        return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *_to_float()])
    steps: list[Any] = [v2.Resize(size), v2.CenterCrop(size)]
    if section.augment == "light":  # no flip: a mirrored digit, letter or sign is another one
        steps.append(v2.RandomAffine(10, (0.1, 0.1), (0.9, 1.1), interpolation=InterpolationMode.BILINEAR))
    return v2.Compose([*steps, *_to_float()])


def _to_float() -> list[Any]:
    # Grey becomes RGB only here: the geometry before it costs a third on one channel.
    return [v2.RGB(), v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD), v2.ToPureTensor()]
