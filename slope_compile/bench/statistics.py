"""What rounds of measurements say: percentiles, throughput, and a ratio with its confidence interval. Milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.bench.measure import Round

CONFIDENCE = 0.95
RESAMPLES = 5000
PERCENTILES = (50, 90, 99)


def describe(rounds: Sequence[Round], batch: int) -> dict[str, Any]:
    """Return latency percentiles over all inferences of all rounds, and the mean throughput of the rounds.

    Args:
        rounds: At least one.
        batch: Items of one inference.
    """
    milliseconds = 1e3 * np.concatenate([one.latencies for one in rounds])
    per_second = float(np.mean([one.per_second for one in rounds]))
    latency = {f"p{level}": float(np.percentile(milliseconds, level)) for level in PERCENTILES}
    return {
        "latency_ms": {**latency, "mean": float(milliseconds.mean()), "min": float(milliseconds.min())},
        "inferences_per_s": per_second,
        "items_per_s": per_second * batch,
        "inferences": int(milliseconds.size),
    }


def compare(engine: Sequence[Round], dense: Sequence[Round]) -> dict[str, Any]:
    """Return how many times faster the engine is than the dense one: above 1 it is faster, below it is slower.

    Args:
        engine: Its rounds.
        dense: The dense engine's, as many; round i of both were measured side by side.

    Returns:
        `latency` (of the rounds' medians) and `throughput`, each with `ratio`, `low` and `high`; `confidence`.
    """
    medians = [np.array([np.median(one.latencies) for one in rounds]) for rounds in (dense, engine)]
    rates = [np.array([one.per_second for one in rounds]) for rounds in (engine, dense)]
    return {"latency": _ratio(*medians), "throughput": _ratio(*rates), "confidence": CONFIDENCE}


def _ratio(above: npt.NDArray[np.float64], below: npt.NDArray[np.float64]) -> dict[str, float]:
    """Return the ratio of two means, with a percentile bootstrap interval over the rounds.

    Rounds are drawn in pairs: what disturbs a round disturbs its neighbour. B. Efron and R. Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapter 13.
    """
    drawn = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[drawn].mean(axis=1) / below[drawn].mean(axis=1)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return {"ratio": float(above.mean() / below.mean()), "low": float(low), "high": float(high)}
