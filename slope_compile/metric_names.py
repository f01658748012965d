"""What the figures of a task are called in front of people."""

from __future__ import annotations

WORDS = {"accuracy": "accuracy", "mask_map": "mask mAP", "box_map": "box mAP"}


def words(metric: str) -> str:
    """Return a metric's name in a sentence; one that is not ours as it is."""
    return WORDS.get(metric, metric.replace("_", " "))


def title(metric: str) -> str:
    """Return a metric's name at the head of a table."""
    name = words(metric)
    return name[:1].upper() + name[1:]


def compared(metric: str) -> tuple[str, ...]:
    """Return the metrics that a run of this primary metric is judged by, the primary one first."""
    return (metric, "box_map") if metric == "mask_map" else (metric,)
