"""Dot and whisker: values with the interval that each is known within, against lines that matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slope_compile.report.charts import WIDTH, axis, drawable, ticks
from slope_compile.report.markup import Markup, join, tag

LEFT, RIGHT, TOP, ROW = 124, 376, 40, 30
CHARACTER = 7  # about the width of one


@dataclass(frozen=True)
class Dot:
    """A value, as text too, and its interval, None if it has none."""

    name: str
    value: float
    text: str
    within: tuple[float, float] | None = None


@dataclass(frozen=True)
class Rule:
    """A vertical line through all rows."""

    name: str
    value: float
    dashed: bool = False


def interval_chart(caption: str, dots: Sequence[Dot], rules: Sequence[Rule]) -> Markup | None:
    """Return dots with whiskers, a row each, on one axis in percent; None if nothing can be drawn.

    Args:
        caption: The message in words.
        dots: Values as shares of 1.
        rules: What they are to be compared with.
    """
    shown = [dot for dot in dots if drawable(dot.value)]
    lines = [rule for rule in rules if drawable(rule.value)]
    values = [dot.value for dot in shown] + [rule.value for rule in lines]
    values += [end for dot in shown for end in dot.within or () if drawable(end)]
    if not shown:
        return None
    marks, decimals = ticks(min(values) * 100, max(values) * 100)
    x = axis(marks[0] / 100, marks[-1] / 100, LEFT, RIGHT)
    bottom = TOP + ROW * len(shown)
    return tag(
        "svg",
        *(_mark(x(mark / 100), f"{mark:.{decimals}f} %".replace("-", "−"), bottom) for mark in _thinned(marks)),
        _rules(lines, x, bottom),
        *(_dot(dot, index, x) for index, dot in enumerate(shown)),
        viewBox=f"0 0 {WIDTH} {bottom + 26}",
        role="img",
        aria_label=caption,
        class_="chart",
    )


def _thinned(marks: Sequence[float]) -> Sequence[float]:
    """Labels of up to six characters: more than five of them would touch."""
    return marks if len(marks) <= 5 else marks[::2]


def _mark(x: float, text: str, bottom: float) -> Markup:
    return join(
        [
            tag("line", x1=x, x2=x, y1=TOP - 6, y2=bottom, class_="grid"),
            tag("text", text, x=x, y=bottom + 16, class_="axis", text_anchor="middle"),
        ]
    )


def _rules(rules: Sequence[Rule], x: Callable[[float], float], bottom: float) -> Markup:
    """Lines with their names on top, from the left to the right.

    Each further one starts a line higher, and the first has its name on its left: no line crosses the name of another.
    """
    parts = []
    for index, rule in enumerate(sorted(rules, key=lambda rule: rule.value)):
        at, y = x(rule.value), 24 - 13 * min(index, 1)
        room = CHARACTER * len(rule.name) + 6
        left = at - room > 0 if index == 0 and len(rules) > 1 else at + room > WIDTH
        style, anchor = ("rule dashed" if rule.dashed else "rule"), ("end" if left else "start")
        name = tag("text", rule.name, x=at + (-5 if left else 5), y=y, text_anchor=anchor)
        parts.append(tag("g", tag("line", x1=at, x2=at, y1=y - 9, y2=bottom, class_=style), name))
    return join(parts)


def _dot(dot: Dot, index: int, x: Callable[[float], float]) -> Markup:
    y = TOP + ROW * index + ROW / 2
    ends = [x(end) for end in dot.within or () if drawable(end)]
    whisker = (
        [
            tag("line", x1=ends[0], x2=ends[1], y1=y, y2=y, class_="whisker"),
            *(tag("line", x1=end, x2=end, y1=y - 5, y2=y + 5, class_="whisker") for end in ends),
        ]
        if len(ends) == 2
        else []
    )
    return tag(
        "g",
        tag("title", f"{dot.name}: {dot.text}"),
        tag("text", dot.name, x=LEFT - 10, y=y + 4, class_="label", text_anchor="end"),
        *whisker,
        tag("circle", cx=x(dot.value), cy=y, r=4.5, class_="dot main"),
    )
