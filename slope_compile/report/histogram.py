"""The cosines of all filters before and after compressed training, as two histograms over each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from slope_compile.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axis, ticks
from slope_compile.report.figures import number, plural
from slope_compile.report.markup import Content, Markup, join, tag
from slope_compile.report.tables import absent, column, details, figure_cell, table

Scale = Callable[[float], float]

MOST_BINS = 40
HEADING = "Cosine of every filter, before and after"


@dataclass(frozen=True)
class Direction:
    """metrics.json's `direction`: counts between edges, None where a run did not keep them.

    Args:
        edges: One more than there are counts, rising.
        before: Filters in each bin as compression began.
        after: The same at the end of training.
        zero: Filters without a direction, before and after.
    """

    edges: Sequence[float]
    before: Sequence[int] | None
    after: Sequence[int]
    zero: tuple[int | None, int | None] = (0, 0)

    def trimmed(self) -> Direction:
        """Return the occupied range alone, in at most `MOST_BINS` bins."""
        both = [sum(pair) for pair in zip(self.after, self.before or [0] * len(self.after), strict=True)]
        held = [index for index, count in enumerate(both) if count]
        first, last = (held[0], held[-1]) if held else (0, len(both) - 1)
        width = math.ceil((last - first + 1) / MOST_BINS)
        starts = range(first - first % width, last + 1, width)
        edges = [self.edges[start] for start in starts]
        edges.append(self.edges[min(starts[-1] + width, len(both))])
        after, before = (
            counts and [sum(counts[start : start + width]) for start in starts] for counts in (self.after, self.before)
        )
        return Direction(edges, before, after or [], self.zero)


def direction_of(metrics: Mapping[str, Any] | None) -> Direction | None:
    """Return what a run counted, None if it did not."""
    found = (metrics or {}).get("direction")
    if not found:
        return None
    zero = found.get("zero") or {}
    return Direction(found["edges"], found["before"], found["after"], (zero.get("before"), zero.get("after")))


def direction_histogram(metrics: Mapping[str, Any] | None) -> tuple[Markup, Markup | None]:
    """Return the two histograms over each other, or what is missing, and their numbers."""
    found = direction_of(metrics)
    if found is None:
        return absent("There is no histogram of single filters: this run was trained before they were counted."), None
    if not sum(found.after) + sum(found.before or []):
        return absent("There is no histogram: no filter has a direction."), None
    shown, caption = found.trimmed(), _caption(found)
    parts = (tag("h3", HEADING), _chart(shown, caption), _legend(found))
    figure = tag("figure", *parts, tag("figcaption", f"{caption}.{_without(found)}"))
    return figure, details("The counts of the histogram", _table(shown))


def _caption(found: Direction) -> str:
    total = plural(sum(found.after), "filter")
    after = _middle(found.edges, found.after)
    if found.before is None:
        return f"Half of {total} have a cosine above {after} after training; the counts before were not kept"
    return f"Half of {total} have a cosine above {_middle(found.edges, found.before)} before, {after} after training"


def _middle(edges: Sequence[float], counts: Sequence[int]) -> str:
    """Return the lower edge of the bin that holds the median."""
    half = sum(counts) / 2
    index = next((i for i, below in enumerate(accumulate(counts)) if below >= half), 0)
    return number(edges[index], 3)


def _without(found: Direction) -> str:
    before, after = found.zero
    if not before and not after:
        return ""
    told = f"{plural(before, 'filter')} before and {after} after" if before is not None else f"{after} after"
    return f" Not drawn, for they have no direction (all codes zero): {told}."


def _legend(found: Direction) -> Markup:
    names = [("swatch outline", "before: as compression begins")] if found.before is not None else []
    names.append(("swatch bars", "after training"))
    items = (tag("li", tag("span", class_=style, aria_hidden="true"), " ", text) for style, text in names)
    return tag("ul", *items, class_="legend")


def _chart(shown: Direction, caption: str) -> Markup:
    marks, decimals = ticks(0.0, float(max([*shown.after, *(shown.before or [])])))
    x = axis(shown.edges[0], shown.edges[-1], LEFT + 10, RIGHT - 10)
    y = axis(0.0, marks[-1], BOTTOM, TOP)
    bars = [_bar(shown, index, x, y) for index, count in enumerate(shown.after) if count]
    outline = [] if shown.before is None else [_outline(shown.edges, shown.before, x, y)]
    return tag(
        "svg",
        *(_y_mark(y(mark), number(mark, decimals)) for mark in marks),
        *(_x_mark(x(edge), number(edge, 3)) for edge in _labelled(shown.edges)),
        tag("text", "cosine", x=(LEFT + RIGHT) / 2, y=HEIGHT - 4, class_="axis", text_anchor="middle"),
        *bars,
        *outline,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=caption,
        class_="chart",
    )


def _bar(shown: Direction, index: int, x: Scale, y: Scale) -> Markup:
    start, end = x(shown.edges[index]) + 0.5, x(shown.edges[index + 1]) - 0.5
    top = y(shown.after[index])
    told = tag("title", _told(shown, index))
    return tag("rect", told, x=start, y=top, width=end - start, height=BOTTOM - top, class_="fill")


def _labelled(edges: Sequence[float]) -> Sequence[float]:
    return edges[:: math.ceil(len(edges) / 7)]


def _told(shown: Direction, index: int) -> str:
    low, high = (number(edge, 3) for edge in shown.edges[index : index + 2])
    return f"{low} to {high}: {shown.after[index]} after" + (f", {shown.before[index]} before" if shown.before else "")


def _outline(edges: Sequence[float], counts: Sequence[int], x: Scale, y: Scale) -> Markup:
    steps = "".join(f"V{y(count):.1f}H{x(high):.1f}" for high, count in zip(edges[1:], counts, strict=True))
    return tag("path", d=f"M{x(edges[0]):.1f} {y(0):.1f}{steps}V{y(0):.1f}", class_="line before")


def _y_mark(y: float, text: str) -> Markup:
    return join(
        [
            tag("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"),
            tag("text", text, x=LEFT - 6, y=y + 4, class_="axis", text_anchor="end"),
        ]
    )


def _x_mark(x: float, text: str) -> Markup:
    return tag("text", text, x=x, y=BOTTOM + 16, class_="axis", text_anchor="middle")


def _table(shown: Direction) -> Markup:
    head: list[Content] = ["Cosine from", "to", column("Before"), column("After")]
    before: Sequence[int | None] = shown.before or [None] * len(shown.after)
    rows = [
        [number(low, 3), number(high, 3), figure_cell("–" if b is None else f"{b:,}"), figure_cell(f"{a:,}")]
        for low, high, b, a in zip(shown.edges, shown.edges[1:], before, shown.after, strict=False)
    ]
    return table("Filters of all coded layers by the cosine of latent and compressed weight", head, rows)
