"""The hops of a verification: which two stages of the chain a parity check compared, and how far they are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slope_compile.report.figures import percent, real, significant

PARITY = "parity."
# Where a check says nothing of it: one that did not run, or one of a verification older than its chain.
ENDS = {
    "parity.folded": ("trained", "folded"),
    "parity.onnx": ("folded", "onnx"),
    "parity.onnx-default": ("onnx", "onnx-default"),
    "parity.placed": ("onnx", "placed"),
    "parity.engine": ("onnx", "engine"),
}


@dataclass(frozen=True)
class Hop:
    """One step of the chain.

    Args:
        check: The check that compared the two.
        start: The stage that is the reference.
        end: The stage that is tested.
        status: Of the check.
        error: Largest difference, relative to the largest reference value; None where nothing was measured.
        allowed: Its limit; None where the check tells the error and does not judge it.
        within: What the error is of, if not of the whole way: `segment by segment`.
    """

    check: str
    start: str
    end: str
    status: str
    error: float | None
    allowed: float | None
    within: str = ""

    @property
    def share(self) -> float | None:
        """Error as a share of what is allowed."""
        return None if self.error is None or not self.allowed else self.error / self.allowed

    @property
    def error_text(self) -> str:
        """The error, short."""
        return "not measured" if self.error is None else significant(self.error, 2)

    @property
    def allowed_text(self) -> str:
        """Its limit, short."""
        if self.error == 0 and self.allowed == 0:
            return "the same bits"
        if self.allowed is not None:
            return f"allowed {significant(self.allowed, 2)}"
        return "" if self.error is None else "not judged"

    @property
    def words(self) -> str:
        """The hop in one sentence."""
        told = self.error_text if self.error is None else f"error {self.error_text}, {self.allowed_text}"
        return f"{self.start} to {self.end}: {self.status}, {told}{self.within and f', {self.within}'}"


def hops_of(verdict: Mapping[str, Any]) -> list[Hop]:
    """Return the hops of a verdict, in the order of its checks."""
    checks = [check for check in verdict["checks"] if str(check["name"]).startswith(PARITY)]
    names = {check["name"] for check in checks}
    return [_hop(check, names) for check in checks]


def _hop(check: Mapping[str, Any], names: set[str]) -> Hop:
    figures: Mapping[str, Any] = check.get("figures") or {}
    start, end = ENDS.get(check["name"], ("?", str(check["name"]).removeprefix(PARITY)))
    if start == "folded" and "parity.folded" not in names:
        start = "trained"
    error, allowed, within = figures.get("relative"), figures.get("tolerance"), ""
    if "segment_relative" in figures:  # quantized activations: judged from quantizer to quantizer
        error, allowed = figures["segment_relative"], figures.get("segment_tolerance")
        within = "segment by segment"
    start, end = str(figures.get("from") or start), str(figures.get("to") or end)
    return Hop(check["name"], start, end, check["status"], real(error), real(allowed), within)


def share_text(share: float | None) -> str:
    """Return an error as a share of what is allowed, `–` where it has none."""
    if share is None:
        return "–"
    if math.isfinite(share) and share >= 10:
        return f"{share:,.0f} times"
    return "less than 0.01 %" if 0 < share < 1e-4 else percent(share, 2 if share < 0.1 else 0)
