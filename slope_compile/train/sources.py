"""Where training gets its inputs from: the data source, the model's own file, the weights file. No torch here.

An image folder is one of

    DIR/train/CLASS/*  +  DIR/val/CLASS/*     (or valid, validation, test: the first that exists)
    DIR/CLASS/*                               (split by the recipe's data.validation)

and a COCO folder one of

    DIR/annotations/instances_train*.json + DIR/train*/    (and val; images also in DIR/images/train*/)
    DIR/train/_annotations.coco.json with its images       (and DIR/valid, val, validation or test)
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slope_compile.artifacts import FileDigest
from slope_compile.errors import DataError, ModelError, nearest
from slope_compile.recipe import Recipe

KINDS = {
    "digits": "digits",
    "fake": "fake:N",
    "imagefolder": "imagefolder:DIR",
    "coco": "coco:DIR",
    "shapes": "shapes:N",
}
DETECTION = ("coco", "shapes")
FAKE_CLASSES = 10
MIN_SHAPES = 8
MAX_FAKE = 10_000_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
VALIDATION_NAMES = ("val", "valid", "validation", "test")
WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")  # what model.weights takes as a local file
USER_MODEL = re.compile(r"(?P<file>.+\.py):(?P<function>[A-Za-z_]\w*)")

TaskKind = Literal["classification", "detection"]


@dataclass(frozen=True)
class Source:
    """A parsed `data.source`: `digits`, `fake:N`, `imagefolder:DIR`, `coco:DIR` or `shapes:N`."""

    kind: Literal["digits", "fake", "imagefolder", "coco", "shapes"]
    items: int = 0  # of fake and shapes
    folder: Path = Path()  # of imagefolder and coco

    @property
    def task(self) -> TaskKind:
        """What is learnt from it."""
        return "detection" if self.kind in DETECTION else "classification"


@dataclass(frozen=True)
class ImageFile:
    """One file of an image folder; size and time of change tell whether it is still the one that was checked."""

    path: str
    size: int
    mtime_ns: int
    label: int


@dataclass(frozen=True)
class ImageFolder:
    """What an image folder holds, in sorted order; `validation` is None where the folder has no split of its own."""

    classes: tuple[str, ...]
    train: tuple[ImageFile, ...]
    validation: tuple[ImageFile, ...] | None


@dataclass(frozen=True)
class CocoSplit:
    """One annotation file and the folder that its file names are relative to."""

    annotations: Path
    images: Path


@dataclass(frozen=True)
class CocoFolder:
    """The splits of a COCO folder; `validation` is None where it has none of its own."""

    train: CocoSplit
    validation: CocoSplit | None


def parse_source(text: str) -> Source:
    """Parse a recipe's `data.source`.

    Raises:
        DataError: If the kind is unknown, N is no number in range, or DIR is not given.
    """
    kind, colon, argument = text.partition(":")
    if kind not in KINDS:
        raise DataError(f"data.source '{text}': there is no source '{kind}'.", nearest(kind, KINDS.values()))
    if kind == "digits":
        if colon:
            raise DataError(f"data.source '{text}': digits takes no argument.", "Write `digits`.")
        return Source("digits")
    if kind == "fake":
        return Source("fake", items=_items(text, argument, 2 * FAKE_CLASSES))  # one image of each class in either split
    if kind == "shapes":
        return Source("shapes", items=_items(text, argument, MIN_SHAPES))
    if not argument:
        raise DataError(f"data.source '{text}' names no folder.", f"Write {kind}:DIR.")
    return Source("coco" if kind == "coco" else "imagefolder", folder=Path(argument).expanduser())


def _items(text: str, argument: str, least: int) -> int:
    items = int(argument) if argument.isdecimal() and len(argument) < 12 else 0
    if not least <= items <= MAX_FAKE:
        example = f"Example: {text.partition(':')[0]}:64"
        raise DataError(f"data.source '{text}': N must be {least} to {MAX_FAKE}.", example)
    return items


def list_folder(root: Path) -> ImageFolder:
    """List an image folder: classes, files, labels; no image is opened.

    Raises:
        DataError: If it is missing, has no classes or only one, an empty class, or splits whose classes differ.
    """
    _require_folder(root)
    top = _subfolders(root)
    held_out = next((name for name in VALIDATION_NAMES if name in top), None)
    if "train" in top and held_out is not None:
        return _split_folder(root / "train", root / held_out)
    base = root / "train" if top == ["train"] else root
    classes = _classes(base)
    return ImageFolder(tuple(classes), _files(base, classes), None)


def find_coco(root: Path) -> CocoFolder:
    """Find the annotation files of a COCO folder and the images that belong to them; nothing is read.

    Raises:
        DataError: If the folder is missing, has no training annotations, or several, or no folder of images.
    """
    _require_folder(root)
    if (root / "annotations").is_dir():
        train = _coco_split(root, "train")
        found = train, _coco_split(root, "val")
    else:
        found = _exported_split(root, ("train",)), _exported_split(root, VALIDATION_NAMES)
    if found[0] is None:
        raise DataError(
            f"{root} holds no training annotations.",
            "Lay it out as DIR/annotations/instances_train2017.json with DIR/train2017/, "
            "or DIR/train/_annotations.coco.json.",
        )
    return CocoFolder(found[0], found[1])


def _coco_split(root: Path, which: str) -> CocoSplit | None:
    files = sorted((root / "annotations").glob(f"instances_{which}*.json"))
    if not files:
        return None
    if len(files) > 1:
        raise DataError(
            f"{root / 'annotations'} holds several of instances_{which}*.json: {_some([f.name for f in files])}.",
            "Keep one of them in the folder that data.source names.",
        )
    name = files[0].stem.removeprefix("instances_")
    folders = [root / name, root / "images" / name]
    images = next((folder for folder in folders if folder.is_dir()), None)
    if images is None:
        raise DataError(
            f"{files[0]} has no images: there is neither {folders[0]} nor {folders[1]}.", "Put its images there."
        )
    return CocoSplit(files[0], images)


def _exported_split(root: Path, names: Iterable[str]) -> CocoSplit | None:
    found = (root / name for name in names if (root / name / "_annotations.coco.json").is_file())
    folder = next(found, None)
    return None if folder is None else CocoSplit(folder / "_annotations.coco.json", folder)


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"The data folder {root} {state}.", "Check the path in data.source.")


def _split_folder(train: Path, validation: Path) -> ImageFolder:
    classes, others = _classes(train), _classes(validation)
    if classes != others:
        only_train = [name for name in classes if name not in others]
        only_validation = [name for name in others if name not in classes]
        sides = [
            f"{folder} alone has {_some(names)}"
            for folder, names in ((train, only_train), (validation, only_validation))
            if names
        ]
        raise DataError(f"The class folders differ: {'; '.join(sides)}.", "Give both splits the same class folders.")
    return ImageFolder(tuple(classes), _files(train, classes), _files(validation, classes))


def _classes(folder: Path) -> list[str]:
    classes = _subfolders(folder)
    if len(classes) < 2:
        found = "no class folders" if not classes else f"a single class folder, '{classes[0]}'"
        remedy = "Lay the images out as DIR/CLASS/image.jpg, or DIR/train/CLASS and DIR/val/CLASS."
        raise DataError(f"{folder} has {found}.", remedy)
    return classes


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _files(folder: Path, classes: list[str]) -> tuple[ImageFile, ...]:
    files: list[ImageFile] = []
    for label, name in enumerate(classes):
        found = list(_images_below(folder / name, label))
        if not found:
            raise DataError(
                f"{folder / name} holds no image ({', '.join(SUFFIXES)}).", "Add images, or remove the class folder."
            )
        files += found
    return tuple(files)


def _images_below(folder: Path, label: int) -> Iterator[ImageFile]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield image_file(f"{parent}/{name}", label)  # a Path per image is slow over a million of them


def image_file(path: str, label: int = 0) -> ImageFile:
    """Return a file's size and time of change; zeros for one that is not there: the decoder names it."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return ImageFile(path, 0, 0, label)
    return ImageFile(path, status.st_size, status.st_mtime_ns, label)


def source_digests(recipe: Recipe) -> dict[str, str]:
    """Return what training reads besides the recipe: name -> digest, so that a change of any makes the stage stale.

    An image folder is digested by its files' paths, sizes and times of change, not by reading every image; a COCO
    folder likewise, its annotation files included.

    Raises:
        DataError: If the data source is not usable.
        ModelError: If the model's file or the weights file is missing.
    """
    found: dict[str, str] = {}
    source = parse_source(recipe.data.source)
    if source.kind == "imagefolder":
        listing = list_folder(source.folder)
        found["data.source files"] = _listing_digest((*listing.train, *(listing.validation or ())))
    if source.kind == "coco":
        folder = find_coco(source.folder)
        splits = [split for split in (folder.train, folder.validation) if split is not None]
        files = [image_file(str(split.annotations)) for split in splits]
        files += [file for split in splits for file in _images_below(split.images, 0)]
        found["data.source files"] = _listing_digest(files)
    if user := USER_MODEL.fullmatch(recipe.model.name):
        found["model.name file"] = _file_digest(Path(user["file"]), "model.name")
    if recipe.model.weights is not None and is_local(recipe.model.weights):
        found["model.weights file"] = _file_digest(Path(recipe.model.weights), "model.weights")
    return found


def _listing_digest(files: Iterable[ImageFile]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.path}\0{file.size}\0{file.mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def is_local(weights: str) -> bool:
    """Tell whether `model.weights` names a local file rather than a library's weights."""
    return weights.endswith(WEIGHTS_SUFFIXES)


def _file_digest(path: Path, key: str) -> str:
    if not path.is_file():
        raise ModelError(f"{key}: there is no file {path}.", "Check the path.")
    return FileDigest.of(path).sha256


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"'{name}'" for name in names[:5]) + more
