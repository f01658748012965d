"""Inline SVG charts: lines over epochs, bars that start at one, sparklines, size bars.

Drawn for a width of 400 units, about the CSS pixels of a phone, so that their text stays readable there. Colours come
from the style sheet's classes: dark mode and print recolour them. Every chart carries its message in words
(`aria-label`); lines and bars carry their name and value as `<title>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slope_compile.report.figures import is_number
from slope_compile.report.markup import Markup, join, tag

WIDTH, HEIGHT = 400, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 388, 26, 194  # the plotting area of a line chart
BAR_ROW = 19
LIMIT = 1e30  # beyond it a value is treated as not drawable: spans would overflow


@dataclass(frozen=True)
class Line:
    """One curve: a value per epoch (None, NaN and infinities leave a gap) and the class that styles it."""

    name: str
    values: Sequence[Any]
    style: str = "main"  # main, thin (one of many), dashed (a reference)


@dataclass(frozen=True)
class Band:
    """A run of epochs with a caption: `first` and `last` are indices, both included."""

    first: int
    last: int
    caption: str


def drawable(value: Any) -> bool:
    """Say whether a value has a place on an axis."""
    return is_number(value) and math.isfinite(value) and abs(value) < LIMIT


def ticks(low: float, high: float, count: int = 4) -> tuple[list[float], int]:
    """Return round positions from at or below `low` to at or above `high`, and the decimals that tell them apart.

    Args:
        low: Least value to be covered.
        high: Greatest value to be covered.
        count: About how many intervals.
    """
    largest = max(abs(low), abs(high))
    if largest < 1 / LIMIT or high - low <= 1e-6 * largest:
        # A flat curve still needs a scale around it, and so does one too small for floats to divide.
        margin = largest * 0.1 if largest >= 1 / LIMIT else 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if math.isclose(step, 2.5 * power) else 0))
    return [index * step for index in range(first, last + 1)], decimals


def line_chart(
    caption: str,
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    scale: float = 1.0,
    unit: str = "",
    first_epoch: int = 1,
) -> Markup:
    """Return a chart of values over epochs.

    Args:
        caption: Its message in words.
        lines: Drawn in order; thin ones belong first.
        bands: Phases of the run, drawn behind with their caption on top.
        scale: What the axis labels are multiplied with (100 for percent).
        unit: Written after the axis labels.
        first_epoch: The number of the first point.
    """
    values = [float(value) for line in lines for value in line.values if drawable(value)]
    if not values:
        return tag("p", "No finite value to draw.", class_="absent")
    marks, decimals = ticks(min(values) * scale, max(values) * scale)
    count = max(len(line.values) for line in lines)
    x = axis(0, max(count - 1, 1), LEFT + 8, RIGHT - 8) if count > 1 else lambda _: (LEFT + RIGHT) / 2
    y = axis(marks[0] / scale, marks[-1] / scale, BOTTOM, TOP)
    half = (x(1) - x(0)) / 2 if count > 1 else (RIGHT - LEFT) / 2
    return tag(
        "svg",
        *(_band(band, x, half) for band in bands),
        *(_y_mark(mark, y(mark / scale), decimals, unit) for mark in marks),
        *(_x_mark(index, x, first_epoch) for index in _x_indices(count)),
        tag("text", "epoch", x=(LEFT + RIGHT) / 2, y=HEIGHT - 4, class_="axis", text_anchor="middle"),
        *(_curve(line, x, y) for line in lines),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=caption,
        class_="chart",
    )


def bar_chart(caption: str, rows: Sequence[tuple[str, float, str]]) -> Markup:
    """Return horizontal bars that start at 1 on the right and reach left to the value: their length is 1 − value.

    Args:
        caption: Its message in words.
        rows: (name, value of at most 1, value as text); only drawable values.
    """
    left, right, height = 138, 346, len(rows) * BAR_ROW
    marks, decimals = ticks(min([*(value for _, value, _ in rows), 0.99]), 1.0)
    x = axis(marks[0], 1.0, left, right)
    grid = [
        join(
            [
                tag("line", x1=x(mark), x2=x(mark), y1=18, y2=height + 22, class_="grid"),
                tag("text", f"{mark:.{decimals}f}", x=x(mark), y=12, class_="axis", text_anchor="middle"),
            ]
        )
        for mark in marks
        if mark <= 1.0 + 1e-9
    ]
    bars = [_bar(row, 22 + index * BAR_ROW, x, right) for index, row in enumerate(rows)]
    return tag(
        "svg", *grid, *bars, viewBox=f"0 0 {WIDTH} {height + 26}", role="img", aria_label=caption, class_="chart"
    )


def sparkline(caption: str, values: Sequence[Any], low: float, high: float) -> Markup:
    """Return a word-sized curve between `low` and `high`, its last point marked."""
    span = high - low or 1.0
    x = axis(0, max(len(values) - 1, 1), 3, 93)
    y = axis(low, low + span, 19, 3)
    return tag(
        "svg",
        _curve(Line(caption, values), x, y, dots=False),
        *(
            tag("circle", cx=x(index), cy=y(float(value)), r=2.2, class_="dot main")
            for index, value in list(enumerate(values))[-1:]
            if drawable(value)
        ),
        viewBox="0 0 96 22",
        role="img",
        aria_label=caption,
        class_="spark",
    )


def waterfall_bar(share: float, before: float) -> Markup:
    """Return one bar of a waterfall, beside its number, so that screen readers skip it.

    Args:
        share: The bar's length, as a share of the largest.
        before: That of the step before: what it took more is shown light, what it took less is marked at the end.
    """
    bar, ghost = max(0.5, 100.0 * share), max(0.5, 100.0 * before)
    grown = bar - ghost if bar - ghost > 0.25 else 0.0  # below that it is no more than the bar's own rounding
    return tag(
        "svg",
        tag("rect", x=0, y=0, width=100, height=8, class_="track"),
        tag("rect", x=0, y=0, width=ghost, height=8, class_="gone") if ghost > bar else None,
        tag("rect", x=0, y=0, width=bar, height=8, class_="fill"),
        tag("rect", x=ghost, y=0, width=grown, height=8, class_="grown") if grown else None,
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_="share",
    )


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return what maps `low` to `start` and `high` to `end`."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _band(band: Band, x: Callable[[float], float], half: float) -> Markup:
    start, end = max(LEFT, x(band.first) - half), min(RIGHT, x(band.last) + half)
    return join(
        [
            tag("rect", x=start, y=TOP - 16, width=end - start, height=BOTTOM - TOP + 16, class_="band"),
            tag("text", band.caption, x=(start + end) / 2, y=TOP - 5, class_="axis", text_anchor="middle"),
        ]
    )


def _y_mark(mark: float, y: float, decimals: int, unit: str) -> Markup:
    text = f"{mark:.{decimals}f}".replace("-", "−")
    return join(
        [
            tag("line", x1=LEFT, x2=RIGHT, y1=y, y2=y, class_="grid"),
            tag("text", f"{text}{unit}", x=LEFT - 6, y=y + 4, class_="axis", text_anchor="end"),
        ]
    )


def _x_indices(count: int) -> list[int]:
    stride = max(1, math.ceil(count / 8))
    return list(range(0, count, stride))


def _x_mark(index: int, x: Callable[[float], float], first_epoch: int) -> Markup:
    return tag("text", index + first_epoch, x=x(index), y=BOTTOM + 16, class_="axis", text_anchor="middle")


def _curve(line: Line, x: Callable[[float], float], y: Callable[[float], float], dots: bool = True) -> Markup:
    """One path for all the runs of drawable values; a run of one point would be invisible without its dot."""
    points = [(x(index), y(float(value))) if drawable(value) else None for index, value in enumerate(line.values)]
    path = ""
    for before, point in zip([None, *points], points, strict=False):
        if point is not None:
            path += f"{'M' if before is None else 'L'}{point[0]:.1f} {point[1]:.1f}"
    few = dots and line.style == "main" and len(points) <= 40
    return tag(
        "g",
        tag("title", line.name),
        tag("path", d=path, class_=f"line {line.style}"),
        *(tag("circle", cx=p[0], cy=p[1], r=2.6, class_=f"dot {line.style}") for p in points if few and p is not None),
    )


def _bar(row: tuple[str, float, str], top: float, x: Callable[[float], float], right: float) -> Markup:
    name, value, text = row
    shown = name if len(name) <= 17 else f"{name[:7]}…{name[-9:]}"
    return tag(
        "g",
        tag("title", f"{name}: {text}"),
        tag("text", shown, x=130, y=top + 12, class_="label", text_anchor="end"),
        tag("rect", x=x(value), y=top + 3, width=max(1.0, right - x(value)), height=BAR_ROW - 8, rx=1, class_="fill"),
        tag("text", text, x=right + 6, y=top + 12, class_="label"),
    )
