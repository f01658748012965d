"""Means, spreads, and paired differences with their confidence intervals."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from scipy.stats import t

CONFIDENCE = 0.95
POST = {"accuracy_ema": "averaged weights (EMA)", "accuracy_re_estimated": "batch norms measured anew"}


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each arm, mean and standard deviation over seeds, and its paired difference to `none` at its bits.

    Accuracies and differences are in points (percent). Where a row has them, the accuracies after weight averaging and
    after batch-norm re-estimation are compared with the very run that they come from.
    """
    by_arm: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        by_arm[row["arm"]][row["seed"]] = row
    result = {}
    for name, runs in by_arm.items():
        accuracies = [100 * run["accuracy"] for run in runs.values()]
        figures: dict[str, Any] = {"seeds": len(runs), **spread(accuracies)}
        for key in ("cosine", "sqnr_db", "density"):
            values = [run[key] for run in runs.values() if run[key] is not None]
            figures[key] = round(statistics.mean(values), 4) if values else None
        figures["fp32"] = round(100 * statistics.mean(run["fp32"] for run in runs.values()), 2)
        for reference in ("dense", f"none {name.split()[-1]}", f"sr-ste {name.split()[-1]}"):
            if reference != name and reference in by_arm:
                figures[f"against {reference}"] = paired(runs, by_arm[reference])
        for key, what in POST.items():
            if all(key in run for run in runs.values()):
                own = {seed: {"accuracy": run[key]} for seed, run in runs.items()}
                figures[what] = paired(own, runs)
        result[name] = figures
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and sample standard deviation, rounded."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.mean(values), 2), "sd": round(deviation, 2)}


def paired(runs: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Return the mean difference over common seeds in points, and the half width of its 95 % t interval."""
    seeds = sorted(runs.keys() & others.keys())
    differences = [100 * (runs[seed]["accuracy"] - others[seed]["accuracy"]) for seed in seeds]
    figures: dict[str, Any] = {"mean": round(statistics.mean(differences), 2), "seeds": len(seeds)}
    if len(seeds) > 1:
        error = statistics.stdev(differences) / len(seeds) ** 0.5
        figures["ci95"] = round(float(t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1)) * error, 2)
    return figures
