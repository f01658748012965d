"""Detections compared with detections: which are the same, and how far the same ones are apart.

A detector decides: which proposals are among the best, which overlap too much, which score is over the threshold. A
difference in a float's last digits can turn such a decision where it is close, and one detection comes, goes or moves.
So detections are first paired: same image, same class, nearly the same box and score. Those without a partner, and
pairs farther apart than the tolerance, are `off`. Of all detections a small share may be off: 1 in 100 where both sides
compute in float32, 1 in 10 where one rounds more coarsely (`COARSE`), so that many more decisions are close. Damaged
weights move nearly all of them. Where there are fewer than 100 (10), none may be off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.verify.parity.tolerance import Tolerance

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
NAMES = {"boxes", "labels", "scores"}  # and `masks`, of a detector that finds them
NEAR = 0.02  # partners: scores this close, and box corners within this share of the largest coordinate
FLOAT_SHARE, COARSE_SHARE = 0.01, 0.1
COARSE = 1e-3  # relative tolerance above which one side is taken to compute with fewer digits than float32


@dataclass(frozen=True)
class Detections:
    """What came of comparing.

    Args:
        count: Detections of the reference and of the tested side, together.
        off: How many of them have no partner, or one farther away than the tolerance.
        allowed: How many may be off.
        pairs: (reference, tested) arrays of the paired detections, by output name.
        problems: Outputs that no detector gives, in words: not sorted, not zero beyond the count.
    """

    count: int
    off: int
    allowed: int
    pairs: Mapping[str, tuple[Array, Array]]
    problems: tuple[str, ...]

    @property
    def within(self) -> bool:
        """Whether both sides found the same, as far as floats allow."""
        return self.off <= self.allowed and not self.problems

    def figures(self) -> dict[str, int]:
        """Return the counts."""
        return {"detections": self.count, "off": self.off, "off_allowed": self.allowed}

    def __str__(self) -> str:
        counts = f"{self.off} of {self.count} detections apart, allowed {self.allowed}"
        return "; ".join((counts, *self.problems))


def are_detections(names: Sequence[str]) -> bool:
    """Return whether these are the names of a detector's outputs."""
    return set(names) - {"masks"} == NAMES


def match(reference: Sequence[Arrays], tested: Sequence[Arrays], tolerance: Tolerance) -> Detections:
    """Pair the detections of each image.

    Args:
        reference: One mapping a feed: `boxes` (n, d, 4), `labels` and `scores` (n, d), perhaps `masks` (n, d, h, w).
        tested: The same of the other side.
        tolerance: Relative to the largest reference value of each output, as everywhere.
    """
    allowed_by = {
        name: tolerance.relative * max(float(np.abs(feed[name]).max(initial=0)) for feed in reference)
        for name in reference[0]
    }
    reach = NEAR * max(float(np.abs(feed["boxes"]).max(initial=0)) for feed in reference)
    pairs: dict[str, list[tuple[Array, Array]]] = {name: [] for name in reference[0]}
    count = off = 0
    problems: list[str] = []
    for expected, found in _images(reference, tested):
        problems += _malformed(found, allowed_by["scores"])
        here = int(np.count_nonzero(expected["scores"] > 0)) + int(np.count_nonzero(found["scores"] > 0))
        count, off = count + here, off + here
        for i, j in _partners(expected, found, reach):
            off -= 2
            apart = False
            for name, values in pairs.items():
                a, b = expected[name][i].astype(np.float64), found[name][j].astype(np.float64)
                apart |= bool(np.abs(a - b).max() > allowed_by[name])
                values.append((a, b))
            off += 2 * apart
    share = COARSE_SHARE if tolerance.relative > COARSE else FLOAT_SHARE
    together = {name: _stacked(values, reference[0][name].shape[2:]) for name, values in pairs.items()}
    return Detections(count, off, int(share * count), together, tuple(dict.fromkeys(problems)))


def _images(reference: Sequence[Arrays], tested: Sequence[Arrays]) -> Iterator[tuple[Arrays, Arrays]]:
    for expected, found in zip(reference, tested, strict=True):
        for image in range(len(expected["scores"])):
            yield ({name: a[image] for name, a in expected.items()}, {name: a[image] for name, a in found.items()})


def _partners(expected: Arrays, found: Arrays, reach: float) -> Iterator[tuple[int, int]]:
    """Yield indices of detections that are the same one, the closest boxes first; each has one partner at most."""
    apart = np.abs(expected["boxes"][:, None] - found["boxes"][None]).max(-1, initial=0)  # [d, d]
    same = expected["labels"][:, None] == found["labels"][None]
    same &= (expected["scores"][:, None] > 0) & (found["scores"][None] > 0)
    same &= np.abs(expected["scores"][:, None] - found["scores"][None]) <= NEAR
    rows, columns = np.nonzero(same & (apart <= reach))
    for index in np.argsort(apart[rows, columns], kind="stable"):
        i, j = int(rows[index]), int(columns[index])
        if same[i, j]:
            same[i] = same[:, j] = False
            yield i, j


def _malformed(found: Arrays, slack: float) -> Iterator[str]:
    scores = found["scores"].astype(np.float64)
    if np.any(np.diff(scores) > slack):
        yield "scores are not sorted"
    if any(found[name][scores <= 0].any() for name in found):
        yield "what is beyond an image's count is not zero"


def _stacked(values: Sequence[tuple[Array, Array]], shape: tuple[int, ...]) -> tuple[Array, Array]:
    if not values:
        return np.zeros((0, *shape)), np.zeros((0, *shape))
    return np.stack([a for a, _ in values]), np.stack([b for _, b in values])
