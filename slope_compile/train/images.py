"""Decoding image files that nobody vouches for.

Files are decoded once before training starts (JPEG at an eighth of its size, which still reads the whole stream), so
that a broken one is found in the first seconds and not in the third hour. Of a large training split only a sample is:
to read all of ImageNet costs as much as an epoch, on every process and in every stage. What is wrong with a whole
folder shows in the sample; a single broken file is met in the first epoch, which reads each file once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from PIL import Image, UnidentifiedImageError

from slope_compile.errors import DataError
from slope_compile.train.sources import ImageFile

# EPS is left out: Pillow hands it to Ghostscript, an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # 256 MiB of RGB: where Pillow itself begins to warn of a decompression bomb
CHECK_ALL = 50_000  # training files that are all decoded before training; of more, SAMPLE, spread evenly
SAMPLE = 5_000
MAX_ASPECT = 200  # the shorter side is resized to data.size: a longer strip would grow without bound


def decode(path: str) -> Image.Image:
    """Return an image file as RGB, 8 bits a channel; the first frame of several; 16-bit grey keeps its upper byte.

    Raises:
        DataError: If it does not decode, or is too large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is not ours to judge
        try:
            return _decode(path, draft=False)
        # A decoder fed with arbitrary bytes raises whatever it likes: OSError, SyntaxError, struct.error, zlib.error …
        except Exception as error:
            raise DataError(
                f"{path}: {_reason(error)}.", "Replace or remove the file, or set data.bad_images: skip."
            ) from None


def to_check(files: Sequence[ImageFile], train: Sequence[int], validation: Sequence[int]) -> tuple[ImageFile, ...]:
    """Return the files to decode before training: all of the validation split, all or a sample of the training split.

    Accuracies are measured on the validation split: what is left out of it must be known before.
    """
    sampled = train if len(train) <= CHECK_ALL else train[:: -(-len(train) // SAMPLE)]
    return tuple(files[index] for side in (sampled, validation) for index in side)


@lru_cache(maxsize=4)
def undecodable(files: tuple[ImageFile, ...]) -> dict[str, str]:
    """Decode every file once and return path -> reason for those that do not.

    Remembered within the process, so that the stages of one run check the same files once.
    """
    pool = ThreadPoolExecutor(os.cpu_count())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reasons = list(pool.map(_why_not, [file.path for file in files]))
        finally:
            pool.shutdown(cancel_futures=True)
    return {file.path: reason for file, reason in zip(files, reasons, strict=True) if reason is not None}


def _why_not(path: str) -> str | None:
    try:
        _decode(path, draft=True)
    except Exception as error:  # see decode
        return _reason(error)
    return None


def _decode(path: str, draft: bool) -> Image.Image:
    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size  # from the header: nothing is decoded yet
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are more than {MAX_PIXELS}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT} times the other")
        if draft:
            image.draft("RGB", (1, 1))
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        rgb: Image.Image = image.convert("RGB")
        return rgb


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is gone"
    if isinstance(error, UnidentifiedImageError):
        return f"not an image ({', '.join(FORMATS)})"
    return " ".join(str(error).split()).removesuffix(".") or type(error).__name__
