"""validation.safetensors: what the FP32 and the compressed model answered for each item of the validation split.

The metric follows from it for any choice of the items, so that the verifier can say how far chance reaches. Numpy reads
it; no torch. Tensors, in the order of the split:

    items                     int64 [1]     how many images
    truth.labels              int32 [items] classification: the right class
    MODEL.predictions         int32 [items] the class with the largest score; MODEL is `fp32` or `compressed`

    truth.image, .label, .count     int32 [r]: detection: so many objects of a class in an image; crowds are left out
    MODEL.KIND.image, .label        int32 [d], KIND is `box` or `mask`: of which image and class each detection is
    MODEL.KIND.score                float32 [d]
    MODEL.KIND.matched, .ignored    int16 [d]: bit t is set where COCO's evaluation, at IoU 0.50 + 0.05 t, counts it as
                                    right, or leaves it out (a crowd's)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from slope_compile.errors import ArtifactError

FILE = "validation.safetensors"
HEADER = {"format": "1"}
MODELS = ("fp32", "compressed")
KINDS = ("box", "mask")
THRESHOLDS = 10  # IoU 0.50, 0.55, … 0.95
MAX_BYTES = 1_000_000_000  # COCO's 5,000 images with 100 detections each take 32 million
REMEDY = "Make it anew with `slope-compile train`."
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Classified:
    """One model's classes beside the right ones.

    Args:
        labels: Int32 [items].
        predictions: Int32 [items].
    """

    labels: npt.NDArray[np.int32]
    predictions: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        _same_length(self.labels, self.predictions)

    @property
    def items(self) -> int:
        """Return how many images."""
        return len(self.labels)

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Return where the model is right, [items]."""
        return np.asarray(self.labels == self.predictions)

    def truth(self) -> dict[str, npt.NDArray[Any]]:
        """Return what does not depend on the model."""
        return {"items": np.array([self.items], np.int64), "truth.labels": self.labels}

    def answers(self) -> dict[str, npt.NDArray[Any]]:
        """Return what does."""
        return {"predictions": self.predictions}


@dataclass(frozen=True)
class Objects:
    """What is to be found: `count` objects of class `label` in image `image`; int32 [r] each."""

    image: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    count: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Matches:
    """One model's detections of one kind, as COCO's evaluation matched them; in the order of images within a class.

    Args:
        image: Int32 [d].
        label: Int32 [d].
        score: Float32 [d].
        matched: Int16 [d]; bit t: right at IoU threshold t.
        ignored: Int16 [d]; bit t: left out of the count at IoU threshold t.
    """

    image: npt.NDArray[np.int32]
    label: npt.NDArray[np.int32]
    score: npt.NDArray[np.float32]
    matched: npt.NDArray[np.int16]
    ignored: npt.NDArray[np.int16]


@dataclass(frozen=True)
class Detected:
    """One model's detections, and what is to be found.

    Args:
        items: How many images.
        objects: In them.
        kinds: `box` and, where the model has masks, `mask`.
    """

    items: int
    objects: Objects
    kinds: Mapping[str, Matches]

    def __post_init__(self) -> None:
        parts: list[Objects | Matches] = [self.objects, *self.kinds.values()]
        for part in parts:
            _same_length(*(getattr(part, field.name) for field in fields(part)))
            _within(part.image, self.items, "image")
            _within(part.label, 2**31 - 1, "label")
        if self.objects.count.size and self.objects.count.min() < 1:
            raise ValueError(f"a count of {self.objects.count.min()} objects")
        for matches in self.kinds.values():
            _within(matches.matched, 1 << THRESHOLDS, "matched")
            _within(matches.ignored, 1 << THRESHOLDS, "ignored")
            if not np.all(np.isfinite(matches.score)) or np.any(matches.matched & matches.ignored):
                raise ValueError("a score is not finite, or a detection both right and left out")

    def truth(self) -> dict[str, npt.NDArray[Any]]:
        """Return what does not depend on the model."""
        named = {f"truth.{field.name}": getattr(self.objects, field.name) for field in fields(Objects)}
        return {"items": np.array([self.items], np.int64), **named}

    def answers(self) -> dict[str, npt.NDArray[Any]]:
        """Return what does."""
        return {
            f"{kind}.{field.name}": getattr(matches, field.name)
            for kind, matches in self.kinds.items()
            for field in fields(Matches)
        }


Answers = Classified | Detected


def flatten(models: Mapping[str, Answers]) -> dict[str, npt.NDArray[Any]]:
    """Return the tensors of several models' answers to the same items."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for model, answers in models.items():
        tensors |= answers.truth()
        tensors |= {f"{model}.{name}": array for name, array in answers.answers().items()}
    return tensors


def unflatten(tensors: Arrays, model: str) -> Answers:
    """Return one model's answers.

    Raises:
        KeyError, ValueError: If a tensor is missing, or not what it should be.
    """
    items = _take(tensors, "items", np.int64)
    if items.shape != (1,) or not 0 <= items[0] < 2**31:
        raise ValueError("items is no number of images")
    if "truth.labels" in tensors:
        labels = _take(tensors, "truth.labels", np.int32)
        if len(labels) != items[0]:
            raise ValueError(f"{len(labels)} labels for {items[0]} items")
        return Classified(labels, _take(tensors, f"{model}.predictions", np.int32))
    objects = Objects(*(_take(tensors, f"truth.{field.name}", np.int32) for field in fields(Objects)))
    types = (np.int32, np.int32, np.float32, np.int16, np.int16)
    kinds = {}
    for kind in KINDS[: 2 if f"{model}.mask.image" in tensors else 1]:
        names = [f"{model}.{kind}.{field.name}" for field in fields(Matches)]
        kinds[kind] = Matches(*(_take(tensors, name, dtype) for name, dtype in zip(names, types, strict=True)))
    return Detected(int(items[0]), objects, kinds)


def save_record(path: Path, fp32: Answers, compressed: Answers) -> None:
    """Write both models' answers; equal answers give equal bytes."""
    tensors = flatten(dict(zip(MODELS, (fp32, compressed), strict=True)))
    save_file({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}, path, metadata=HEADER)


def load_record(path: Path) -> dict[str, Answers]:
    """Read `fp32` and `compressed`, every number checked.

    Raises:
        ArtifactError: If the file is missing, too large, damaged, or not ours.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES} bytes")
        with safe_open(path, framework="numpy") as file:
            if (file.metadata() or {}) != HEADER:
                raise ValueError(f"its header is {file.metadata()}, not {HEADER}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return {model: unflatten(tensors, model) for model in MODELS}
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist.", REMEDY) from None
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is no record of validation: {error}.", REMEDY) from None


def _take(tensors: Arrays, name: str, dtype: Any) -> npt.NDArray[Any]:
    array = tensors[name]
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} [n]")
    return array


def _same_length(*arrays: npt.NDArray[Any]) -> None:
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"lengths differ: {[len(array) for array in arrays]}")


def _within(array: npt.NDArray[Any], end: int, what: str) -> None:
    if array.size and not (array.min() >= 0 and array.max() < end):
        raise ValueError(f"{what} from {array.min()} to {array.max()}, not 0 to {end - 1}")
