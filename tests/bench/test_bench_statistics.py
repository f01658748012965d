from __future__ import annotations

import numpy as np
import pytest

from slope_compile.bench.measure import Round
from slope_compile.bench.statistics import compare, describe


def rounds(milliseconds: float, count: int = 10, noise: float = 0.0) -> list[Round]:
    generator = np.random.default_rng(0)
    drift = 1 + noise * generator.standard_normal(count)
    return [Round(tuple([1e-3 * milliseconds * d] * 20), 1e3 / (milliseconds * d)) for d in drift]


def test_percentiles_of_all_rounds_together() -> None:
    one = Round(tuple(1e-3 * i for i in range(1, 51)), 100.0)
    two = Round(tuple(1e-3 * i for i in range(51, 101)), 300.0)
    found = describe([one, two], batch=4)
    expected = {"p50": 50.5, "p90": 90.1, "p99": 99.01, "mean": 50.5, "min": 1.0}
    assert found["latency_ms"] == pytest.approx(expected)
    assert (found["inferences_per_s"], found["items_per_s"], found["inferences"]) == (200.0, 800.0, 100)


def test_ratio() -> None:
    found = compare(engine=rounds(2.0), dense=rounds(3.0))
    for what in ("latency", "throughput"):  # 1.5 times as fast, by both
        assert found[what] == pytest.approx({"ratio": 1.5, "low": 1.5, "high": 1.5})
    slower = compare(engine=rounds(3.0), dense=rounds(2.0))
    assert slower["latency"]["ratio"] == pytest.approx(2 / 3)


def test_what_disturbs_both_widens_nothing() -> None:
    """Clocks that drift hit neighbouring rounds alike; drawn in pairs they leave the ratio alone."""
    paired = compare(rounds(2.0, noise=0.2), rounds(3.0, noise=0.2))
    assert paired["latency"]["high"] - paired["latency"]["low"] < 1e-9


def test_the_interval_holds_the_ratio_and_repeats() -> None:
    engine = [Round((1e-3 * m,) * 5, 1e3 / m) for m in (1.0, 1.2, 0.9, 1.1, 1.0, 1.3)]
    found = compare(engine, rounds(2.0, count=6))
    assert found["latency"]["low"] < found["latency"]["ratio"] < found["latency"]["high"]
    assert found == compare(engine, rounds(2.0, count=6))


def test_coverage() -> None:
    """Over many made-up measurements the 95 % interval holds the truth about as often as it says."""
    generator, hits, trials = np.random.default_rng(1), 0, 60
    for _ in range(trials):
        drawn = 1 + 0.05 * generator.standard_normal((2, 20))
        engine, dense = ([Round((float(m),), 1.0 / m) for m in row] for row in drawn)
        interval = compare(engine, dense)["latency"]
        hits += interval["low"] <= 1 <= interval["high"]
    assert hits / trials > 0.85
