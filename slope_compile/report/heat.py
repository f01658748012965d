"""The error of every layer at every hop of the chain: a strip per hop to see, a table to read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slope_compile.report.data import RunData
from slope_compile.report.figures import ABSENT, plural, real, significant
from slope_compile.report.hops import share_text
from slope_compile.report.markup import Content, Markup, join, tag
from slope_compile.report.tables import (
    Cell,
    absent,
    code,
    column,
    details,
    section,
    sentences,
    sub,
    table,
)

MANY_LAYERS = 32  # beyond it the numbers start folded
APART = 100  # up to so many layers a strip shows gaps between its cells
TITLE = "Error by layer"
NOTE = (
    "The strips go from the first layer on the left to the last on the right. Colour: the largest difference of a "
    "layer's output, relative to that output, as a share of what float arithmetic allows there."
)
# (class, upper bound of the share that it stands for, what it says)
STEPS = (
    ("h0", 0.0, "no difference"),
    ("h1", 1e-3, "below 1/1000 of what is allowed"),
    ("h2", 1e-2, "below 1/100"),
    ("h3", 1e-1, "below 1/10"),
    ("h4", 1.0, "up to all of it"),
)
BEYOND, UNKNOWN = ("h5", "✗ more than allowed"), ("hn", "not measured, or without a limit")


@dataclass(frozen=True)
class LayerError:
    """The error of one layer at one hop; None where it was not measured."""

    layer: str
    operator: str
    relative: float | None
    allowed: float | None

    @property
    def share(self) -> float | None:
        """Error as a share of what is allowed; of nothing allowed, any error is beyond it."""
        if self.relative is None or self.allowed is None:
            return None
        if math.isnan(self.relative) or math.isnan(self.allowed):
            return math.inf
        return self.relative / self.allowed if self.allowed > 0 else math.inf if self.relative else 0.0

    @property
    def style(self) -> str:
        """The class of its colour."""
        share = self.share
        if share is None:
            return UNKNOWN[0]
        return next((name for name, bound, _ in STEPS if share <= bound), BEYOND[0])

    @property
    def words(self) -> str:
        """The error and its limit."""
        if self.relative is None:
            return "not measured"
        limit = "no limit" if self.allowed is None else f"{significant(self.allowed, 2)} allowed"
        return f"{'✗ ' if self.style == BEYOND[0] else ''}{significant(self.relative, 2)}, {limit}"


@dataclass(frozen=True)
class HopErrors:
    """All layers at one hop, in graph order."""

    check: str
    name: str
    errors: Sequence[LayerError]


def heat(data: RunData) -> Markup:
    """Return the error of every layer for each target that has them."""
    if not data.verdicts:
        return section("heat", TITLE, absent("Nothing was verified."))
    parts: list[Content] = []
    for target in data.verdicts:
        parts.append(tag("h3", f"For {target}", class_="target") if len(data.verdicts) > 1 else None)
        parts += _target(target, data.layer_errors.get(target))
    return section("heat", TITLE, sentences([NOTE]), _legend(), *parts)


def _target(target: str, document: Mapping[str, Any] | None) -> list[Content]:
    found = hop_errors(document)
    measured = [hop for hop in found if any(error.relative is not None for error in hop.errors)]
    if not measured:
        why = "this verification kept none" if document is None else "no comparison could be made layer by layer"
        return [absent(f"There are no errors by layer for {target}: {why}.")]
    layers = len(measured[0].errors)
    grid = details(
        f"The numbers: {plural(layers, 'layer')}, {plural(len(measured), 'comparison')}",
        _table(target, measured),
        expanded=layers <= MANY_LAYERS,
    )
    return [*(_strip(hop) for hop in measured), grid]


def hop_errors(document: Mapping[str, Any] | None) -> list[HopErrors]:
    """Return layers.json of a verification hop by hop."""
    rows = (document or {}).get("layers") or []
    return [
        HopErrors(
            str(hop["check"]),
            f"{hop['from']} → {hop['to']}",
            [_error(row, (row.get("errors") or {}).get(hop["check"]) or {}) for row in rows],
        )
        for hop in (document or {}).get("hops") or []
    ]


def _error(row: Mapping[str, Any], found: Mapping[str, Any]) -> LayerError:
    return LayerError(
        str(row["name"]), str(row.get("operator") or ""), real(found.get("relative")), real(found.get("allowed"))
    )


def _legend() -> Markup:
    told = [(name, text) for name, _, text in STEPS] + [BEYOND, UNKNOWN]
    items = (tag("li", tag("span", class_=f"swatch {name}", aria_hidden="true"), " ", text) for name, text in told)
    return tag("ul", *items, class_="legend")


def _strip(hop: HopErrors) -> Markup:
    """One hop: in words, then a cell a layer, stretched to the width there is."""
    count = len(hop.errors)
    cells = (
        tag("rect", tag("title", f"{error.layer}: {error.words}"), x=i, y=0, width=1, height=1, class_=error.style)
        for i, error in enumerate(hop.errors)
    )
    strip = tag(
        "svg",
        *cells,
        viewBox=f"0 0 {count} 1",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{hop.name}, {plural(count, 'layer')}: {_worst(hop)}",
        class_="strip apart" if count <= APART else "strip",
    )
    words = tag("figcaption", code(hop.name), f" ({hop.check}): {_worst(hop)}.")
    return tag("figure", words, strip, class_="hop")


def _worst(hop: HopErrors) -> str:
    """Name the layer that comes nearest to its limit, or has the largest error where there are no limits."""
    measured = [error for error in hop.errors if error.relative is not None]
    if not measured:
        return "nothing was measured"
    if not any(error.relative for error in measured):  # NaN is not 0
        return "no layer differs at all"
    beyond = [error for error in measured if error.style == BEYOND[0]]
    if beyond:
        return f"✗ {plural(len(beyond), 'layer')} beyond the limit, the first is {beyond[0].layer} ({beyond[0].words})"
    limited = [error for error in measured if error.share is not None]
    worst = max(limited or measured, key=lambda error: (error.share if limited else error.relative) or 0.0)
    share = f", {share_text(worst.share)} of what is allowed" if worst.share is not None else ""
    return f"largest at {worst.layer}: {significant(worst.relative, 2)}{share}"


def _table(target: str, hops: Sequence[HopErrors]) -> Markup:
    limits = {hop.check: {error.allowed for error in hop.errors if error.allowed is not None} for hop in hops}
    head: list[Content] = ["Layer", *(_head(hop, limits[hop.check]) for hop in hops)]
    rows = [
        [
            join([code(errors[0].layer), sub(errors[0].operator) if errors[0].operator else None]),
            *(_cell(error, len(limits[hop.check]) > 1) for hop, error in zip(hops, errors, strict=True)),
        ]
        for errors in zip(*(hop.errors for hop in hops), strict=True)
    ]
    return table(f"Largest relative error of each layer's output, for {target}", head, rows, sticky=True)


def _head(hop: HopErrors, limits: set[float]) -> Cell:
    limit = f"allowed {significant(next(iter(limits)), 2)}" if len(limits) == 1 else hop.check
    return column(join([hop.name, sub(limit)]))


def _cell(error: LayerError, limits_differ: bool) -> Cell:
    """A number on its colour; a cross where it is beyond its limit, so that colour is not all."""
    if error.relative is None:
        return Cell(tag("td", ABSENT, class_="n heat hn"))
    cross = "✗ " if error.style == BEYOND[0] else ""
    limit = sub(f"of {significant(error.allowed, 2)}") if limits_differ and error.allowed is not None else None
    return Cell(tag("td", f"{cross}{significant(error.relative, 2)}", limit, class_=f"n heat {error.style}"))
