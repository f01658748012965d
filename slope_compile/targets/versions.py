"""What differs between the versions of TensorRT: one table, held against the bindings wheels by a test."""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, ...]
MOST_DIGITS = 9  # Python reads no number of thousands; where one stands, it is later than all others


def parse_version(text: str) -> Version:
    """Return the numbers of a version, so that versions compare: `10.16.1.11` is later than `10.3`.

    Args:
        text: Numbers between dots; anything after them (`rc1`, `+cuda12`) is left out.
    """
    parts = re.findall(r"\d+", re.match(r"[\d.]*", text).group())  # type: ignore[union-attr]
    return tuple(int(part) if len(part) <= MOST_DIGITS else 10**MOST_DIGITS for part in parts)


@dataclass(frozen=True)
class Span:
    """Versions of one backend: `first` inclusive, `below` exclusive, None: open."""

    backend: str
    first: str | None = None
    below: str | None = None

    def holds(self, backend: str, version: str) -> bool:
        """Whether a version of a backend is one of them."""
        here = parse_version(version)
        return (
            backend == self.backend
            and (self.first is None or parse_version(self.first) <= here)
            and (self.below is None or here < parse_version(self.below))
        )


# What is not the same in every version that the tool works with: TensorRT 10.3 to 11.x, TensorRT-RTX 1.x.
DIFFERENCES: dict[str, tuple[Span, ...]] = {
    # Networks are strongly typed only when asked; from 11.0 on always, and the flag does nothing.
    "asks_for_strong_typing": (Span("tensorrt", below="11"),),
    # Builder flags FP16, INT8, ...: removed in 11.0. Never set: a network's types say it all.
    "precision_flags": (Span("tensorrt", below="11"),),
    # HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    "same_compute_capability": (Span("tensorrt", first="10.9"), Span("tensorrt-rtx")),
    # BuilderFlag.EDITABLE_TIMING_CACHE
    "editable_timing_cache": (Span("tensorrt", first="10.8"), Span("tensorrt-rtx")),
    # DataType.FP4
    "fp4": (Span("tensorrt", first="10.8"), Span("tensorrt-rtx")),
    # "TensorRT 10.7 was the last release that supported DLA", until 11.4.1 on JetPack 7.2.2 (Working with DLA, 11.4.1)
    "dla": (Span("tensorrt", below="10.8"), Span("tensorrt", first="11.4.1")),
    # "Enabling kREFIT may produce incorrect numerical output" (Refitting an Engine, 11.3.0; not on that page in 11.4.0)
    "refit_drops_bias": (Span("tensorrt", first="11.3", below="11.4"),),
}


def has(feature: str, backend: str, version: str) -> bool:
    """Whether a version of a backend has a feature of the table.

    Args:
        feature: A key of `DIFFERENCES`.
        backend: `tensorrt` or `tensorrt-rtx`.
        version: Such as `10.3.0`.
    """
    return any(span.holds(backend, version) for span in DIFFERENCES[feature])
