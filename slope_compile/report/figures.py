"""Numbers as a person reads them; what is absent or not finite is said, never drawn as a number."""

from __future__ import annotations

import math
from typing import Any

ABSENT = "–"
SAME_LINE = "\N{NO-BREAK SPACE}"


def is_number(value: Any) -> bool:
    """Say whether `value` is a real number (bool is none; NaN and infinities are)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def real(value: Any) -> float | None:
    """Return a figure of verify.json as a float; there `nan`, `inf` and `-inf` stand as text. None if it is none."""
    if isinstance(value, str) and value in ("nan", "inf", "-inf"):
        return float(value)
    return float(value) if is_number(value) else None


def number(value: Any, decimals: int) -> str:
    """Return `value` with that many decimals; `∞`, `not a number` and `–` (absent) where there is none to write."""
    if not is_number(value):
        return ABSENT
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.{decimals}f}".replace("-", "−")


def significant(value: Any, digits: int = 3) -> str:
    """Return `value` with so many significant digits: for quantities whose magnitude differs from layer to layer."""
    if not is_number(value) or not math.isfinite(value):
        return number(value, 0)
    return f"{value:.{digits}g}".replace("-", "−")


def percent(value: Any, decimals: int = 2) -> str:
    """Return a share of 1 in percent; the sign stays with its number where a line ends."""
    if not is_number(value) or not math.isfinite(value):
        return number(value, 0)
    return f"{number(value * 100, decimals)}{SAME_LINE}%"


def size(count: int) -> str:
    """Return bytes in decimal units: 5732579 -> `5.73 MB`."""
    if count < 1000:
        return f"{count} B"
    value, unit = count / 1000, "kB"
    for larger in ("MB", "GB"):
        if value >= 999.5:  # it would be written as 1,000 of the smaller unit
            value, unit = value / 1000, larger
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def ratio(count: int, reference: int | None) -> str:
    """Return how it compares with `reference`: `7.8× smaller`, `1.2× larger`, or `–` without a reference."""
    if not reference or count <= 0:
        return ABSENT
    if count <= reference:
        return f"{reference / count:.1f}× smaller" if count < reference else "1×"
    return f"{count / reference:.1f}× larger"


def plural(count: int, noun: str) -> str:
    """Return `1 layer`, `2 layers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
