from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.verify.metric import bootstrap
from slope_compile.verify.metric.bootstrap import (
    PRIOR,
    Interval,
    accuracy_interval,
    drop_interval,
    items_to_tell,
    of_values,
    unseen,
)

Bools = np.ndarray


def pair(both: int, lost: int, won: int, neither: int) -> tuple[Bools, Bools]:
    """Right and wrong of a reference and a tested model, by how many images are of each kind."""
    cells = np.repeat(np.arange(4), (both, lost, won, neither))
    return cells < 2, (cells == 0) | (cells == 2)


def weighted_quantile(shares: Counter[float], level: float) -> float:
    total = 0.0
    for value in sorted(shares):
        total += shares[value]
        if total >= level:
            return value
    raise AssertionError("shares sum to less than the level")


def enumerated(reference: Bools, tested: Bools) -> tuple[float, float]:
    """The interval without any drawing: every multiset of the four kinds of images, with its probability."""
    items = len(reference)
    kinds = Counter(zip(reference.tolist(), tested.tolist(), strict=True))
    weights = {kind: kinds[kind] + PRIOR * (kind[0] != kind[1]) for kind in itertools.product((False, True), repeat=2)}
    shares: Counter[float] = Counter()
    for counts in itertools.product(range(items + 1), repeat=4):
        if sum(counts) != items:
            continue
        chance = math.factorial(items)
        right = [0, 0]
        for count, (kind, weight) in zip(counts, weights.items(), strict=True):
            chance *= (weight / (items + 2 * PRIOR)) ** count / math.factorial(count)
            right = [right[0] + count * kind[0], right[1] + count * kind[1]]
        shares[(right[0] - right[1]) / right[0] if right[0] else 0.0] += chance
    return weighted_quantile(shares, 0.025), weighted_quantile(shares, 0.975)


@pytest.mark.parametrize("cells", [(6, 2, 1, 1), (5, 3, 3, 1), (2, 4, 2, 0), (9, 1, 1, 1)])
def test_the_interval_is_that_of_all_draws_enumerated(cells: tuple[int, int, int, int]) -> None:
    """Ten or so images: the ends of the drawn interval are those of the exact distribution."""
    reference, tested = pair(*cells)
    found, (low, high) = drop_interval(reference, tested), enumerated(reference, tested)
    assert found is not None and found.resamples == 10_000
    assert found.low == pytest.approx(low, abs=1e-9)
    assert found.high == pytest.approx(high, abs=1e-9)


def test_counts_are_drawn_as_images_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the half images, drawing 400 images one by one, in pairs, gives the same interval."""
    monkeypatch.setattr(bootstrap, "PRIOR", 0.0)
    reference, tested = pair(300, 20, 12, 68)
    rng = np.random.default_rng(7)
    drawn = rng.integers(0, 400, (10_000, 400))
    before, after = reference[drawn].sum(axis=1), tested[drawn].sum(axis=1)
    low, high = np.quantile((before - after) / before, [0.025, 0.975])
    found = drop_interval(reference, tested)
    assert found is not None
    assert found.low == pytest.approx(low, abs=0.002) and found.high == pytest.approx(high, abs=0.002)
    low, high = np.quantile(after / 400, [0.025, 0.975])
    own = accuracy_interval(tested)
    assert own.low == pytest.approx(low, abs=0.003) and own.high == pytest.approx(high, abs=0.003)


def test_no_change_among_359_images_is_no_certainty() -> None:
    """What no image shows may have a share of 3.7 / n: (1 - p)^359 = 2.5 %."""
    assert unseen(359) == pytest.approx(0.010223, abs=1e-6)
    assert (1 - unseen(359)) ** 359 == pytest.approx(0.025)
    reference, _ = pair(354, 0, 0, 5)
    found = drop_interval(reference, reference)
    assert found is not None
    rare = unseen(359) * 359 / 354
    assert (found.low, found.high) == (pytest.approx(-rare), pytest.approx(rare))
    assert found.high > 0.01
    assert items_to_tell(0.0, found, 0.01, 359) == 390
    every = accuracy_interval(np.ones(359, bool))
    assert every.high == 1.0 and every.low <= 1 - unseen(359)
    none = accuracy_interval(np.zeros(359, bool))
    assert none.low == 0.0 and none.high >= unseen(359)


def test_a_reference_that_is_never_right_can_lose_nothing() -> None:
    assert drop_interval(*pair(0, 0, 3, 7)) is None


@given(cells=st.tuples(st.integers(1, 400), *[st.integers(0, 60)] * 3))
@settings(max_examples=30, deadline=None)
def test_the_interval_holds_the_drop_and_turns_with_it(cells: tuple[int, int, int, int]) -> None:
    both, lost, won, _ = cells
    reference, tested = pair(*cells)
    found = drop_interval(reference, tested)
    assert found is not None
    assert found == drop_interval(reference, tested)
    assert found.low <= (lost - won) / (both + lost) <= found.high
    order = np.random.default_rng(0).permutation(len(reference))
    assert found == drop_interval(reference[order], tested[order])  # the order of the images does not matter
    own = accuracy_interval(tested)
    assert 0 <= own.low <= tested.mean() <= own.high <= 1


@given(items=st.integers(20, 300))
@settings(max_examples=15, deadline=None)
def test_more_images_narrow_the_interval(items: int) -> None:
    few, many = (drop_interval(*pair(16 * n, n, n, 2 * n)) for n in (items, 4 * items))
    assert few is not None and many is not None
    assert 1.6 < (few.high - few.low) / (many.high - many.low) < 2.5  # 1 / sqrt(n)


def test_figures_that_are_not_defined_are_not_drawn() -> None:
    values = np.append(np.linspace(0, 1, 1001), [np.nan] * 9)
    assert of_values(values) == Interval(pytest.approx(0.025), pytest.approx(0.975), 1001)
    assert of_values(np.full(3, np.nan)).resamples == 0


@pytest.mark.parametrize(
    ("drop", "ends", "needed"),
    [
        (0.0, (-0.02, 0.02), 400),  # twice too wide: four times as many
        (0.03, (0.005, 0.05), 160),
        (0.01, (0.0, 0.02), None),  # on the budget itself: no number of images tells
        (0.0, (-0.3, 0.37), 140_000),
    ],
)
def test_how_many_images_would_tell(drop: float, ends: tuple[float, float], needed: int | None) -> None:
    assert items_to_tell(drop, Interval(*ends, 10), 0.01, 100) == needed
