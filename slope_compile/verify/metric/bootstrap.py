"""How far chance reaches in an accuracy and in its drop: a paired bootstrap over the images of the validation split.

Images are drawn with replacement, as many as there are, and both models are scored on the same draw. An accuracy knows
an image only as right or wrong, so the draw is one of counts (a multinomial over the four cells right/wrong of two
models): the same distribution as by drawing images, at a cost that does not depend on how many there are.

Two additions, because a plain bootstrap is sure of what it has not seen: among 359 images without one that turned wrong
it never draws one. Half an image is added to each cell that tells the models apart (Jeffreys' prior for a share), and a
kind of change that no image shows may still have a share of up to `unseen(n)`. benchmarks/bootstrap.py measures how
often the interval holds the truth; docs/verify.md has the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
TAIL = (1 - CONFIDENCE) / 2  # at each end
RESAMPLES = 10_000
SEED = 0  # the same figures give the same interval
PRIOR = 0.5  # images; Jeffreys (1946), https://doi.org/10.1098/rspa.1946.0056

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Where the figure over all images of this kind lies, with 95 % confidence; `resamples` draws were made."""

    low: float
    high: float
    resamples: int

    def widened(self, low: float, high: float) -> Interval:
        """Return the interval that also holds `low` to `high`."""
        return Interval(min(self.low, low), max(self.high, high), self.resamples)


def unseen(items: int) -> float:
    """Return the largest share that a kind of image may have of which `items` draws show none, at 97.5 % confidence.

    The solution p of (1 - p)^n = 2.5 %, about 3.7 / n: the exact binomial bound, a rule of three for one end of two.
    """
    return -math.expm1(math.log(TAIL) / items)


def accuracy_interval(right: Bools) -> Interval:
    """Return the interval of an accuracy.

    Args:
        right: Whether the model is right, [items].
    """
    items, hits = len(right), int(np.count_nonzero(right))
    cells = np.array([hits + PRIOR, items - hits + PRIOR])
    drawn = _generator().multinomial(items, cells / cells.sum(), size=RESAMPLES)[:, 0] / items
    found = of_values(drawn)
    low = 1 - unseen(items) if hits == items else 1.0
    return found.widened(low, unseen(items) if hits == 0 else 0.0)


def drop_interval(reference: Bools, tested: Bools) -> Interval | None:
    """Return the interval of the relative drop of an accuracy, (reference - tested) / reference.

    Args:
        reference: Whether the reference is right, [items].
        tested: Whether the tested model is right on the same images.

    Returns:
        None where the reference is never right: nothing can be lost.
    """
    items, hits = len(reference), int(np.count_nonzero(reference))
    if hits == 0:
        return None
    lost, won = int(np.count_nonzero(reference & ~tested)), int(np.count_nonzero(tested & ~reference))
    cells = np.array([hits - lost, lost + PRIOR, won + PRIOR, items - hits - won])
    drawn = _generator().multinomial(items, cells / cells.sum(), size=RESAMPLES)
    kept = drawn[:, 0] + drawn[:, 1]  # images that the reference has right
    drops = np.divide(drawn[:, 1] - drawn[:, 2], kept, out=np.zeros(RESAMPLES), where=kept > 0)
    drop, rare = (lost - won) / hits, unseen(items) * items / hits
    return of_values(drops).widened(drop if won else drop - rare, drop if lost else drop + rare)


def of_values(values: Floats) -> Interval:
    """Return the percentile interval of resampled figures; those that are not defined (NaN) count as not drawn."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return Interval(math.nan, math.nan, 0)
    low, high = np.quantile(defined, [TAIL, 1 - TAIL])
    return Interval(float(low), float(high), len(defined))


def items_to_tell(drop: float, interval: Interval, budget: float, items: int) -> int | None:
    """Return about how many images would tell on which side of a budget a drop lies, to two digits; None: no number.

    The interval's ends come as close as 1 / sqrt(images).
    """
    gap = abs(budget - drop)
    reach = interval.high - drop if drop <= budget else drop - interval.low
    if gap == 0 or not math.isfinite(reach / gap):
        return None
    needed = items * (reach / gap) ** 2
    digits: int = 10 ** max(math.floor(math.log10(max(needed, 1))) - 1, 0)
    return math.ceil(needed / digits) * digits


def _generator() -> np.random.Generator:
    return np.random.default_rng(SEED)
