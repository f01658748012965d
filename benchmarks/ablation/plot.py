"""Accuracy of each arm, its seeds as dots, beside its alignment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "ablation"  # equal figures give equal bytes

from matplotlib import pyplot as plt  # noqa: E402


def plot(summary: dict[str, dict[str, Any]], path: Path) -> None:
    """Write an SVG: a row for each arm, mean accuracy with its standard deviation, mean cosine to the right."""
    names = list(summary)[::-1]
    rows = range(len(names))
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(9, 0.8 + 0.28 * len(names)), width_ratios=[2, 1], layout="constrained"
    )
    for row, name in zip(rows, names, strict=True):
        left.errorbar(summary[name]["mean"], row, xerr=summary[name]["sd"], fmt="o", color="C0", capsize=3)
        if summary[name]["cosine"] is not None:
            right.plot(summary[name]["cosine"], row, "s", color="C1")
    left.set_yticks(rows, names)
    left.set_xlabel("accuracy, % (mean and standard deviation over seeds)")
    right.set_xlabel("cosine between w and ŵ (mean over layers)")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
