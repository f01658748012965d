"""Tables and the small words in them: scrolling frames, header scopes, statuses that do not rest on colour."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from slope_compile.report.figures import number
from slope_compile.report.markup import Content, Markup, join, tag

SHORT = 8  # rows
STATUS = {"pass": ("✓", "pass", "pass"), "fail": ("✗", "FAIL", "fail"), "not checked": ("○", "not checked", "open")}


class Cell(Markup):
    """A `td` or `th` element; any other content of a table is still to be put into one."""

    __slots__ = ()


def table(caption: str, head: Sequence[Content], rows: Iterable[Sequence[Content]], sticky: bool = False) -> Markup:
    """Return a table in a frame that scrolls sideways where the screen is narrow.

    Args:
        caption: What the table holds; also the frame's name for assistive technology.
        head: Column titles, or cells.
        rows: The first of a row is its header; the others are content or cells.
        sticky: Keep the first column in sight while scrolling.
    """
    body = [tag("tr", _cell("th", row[0], scope="row"), *(_cell("td", c) for c in row[1:])) for row in rows]
    # On paper a short table stays on one page.
    styles = [style for style, holds in (("sticky", sticky), ("short", len(body) <= SHORT)) if holds]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *(_cell("th", cell, scope="col") for cell in head))),
            tag("tbody", *body),
            class_=" ".join(styles) or None,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def _cell(name: str, content: Content, scope: str | None = None) -> Markup:
    return content if isinstance(content, Cell) else tag(name, content, scope=scope)


def column(title: Content) -> Cell:
    """Return the header of a column of numbers."""
    return Cell(tag("th", title, scope="col", class_="n"))


def cell(*children: Content, style: str | None = None) -> Cell:
    """Return a cell; `style` is a class: `n` for numbers, `wide` for prose, `nowrap` for what must stay on one line."""
    return Cell(tag("td", *children, class_=style))


def figure_cell(text: Content) -> Cell:
    """Return a cell with a number."""
    return cell(text, style="n")


def wide_cell(*children: Content) -> Cell:
    """Return a cell of prose that asks for room."""
    return cell(*children, style="wide")


def code(text: str) -> Markup:
    """Return a name from the run in a fixed-width face."""
    return tag("span", text, class_="code")


def check_name(name: str) -> Markup:
    """Return a check's name, which stays in one piece unless it is none of ours."""
    return tag("span", name, class_="code nowrap" if len(name) <= 24 else "code")


def sub(text: str) -> Markup:
    """Return a second, quieter line of a cell."""
    return tag("span", text, class_="sub")


def status(name: str) -> Markup:
    """Return a check's status as sign and word; a status that is not ours is shown as it is."""
    sign, word, style = STATUS.get(name, ("○", name, "open"))
    return tag("span", f"{sign} {word}", class_=f"status {style}")


def absent(text: str) -> Markup:
    """Return a sentence that says what is not there."""
    return tag("p", text, class_="absent")


def details(summary: str, *children: Content, expanded: bool = False) -> Markup:
    """Return a part that opens without a script."""
    return tag("details", tag("summary", summary), *children, open=expanded)


def value_text(value: Any) -> str:
    """Return a JSON value in a few words: figures of a check, values of a recipe."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, 0) if value != value or abs(value) == float("inf") else f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {value_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(item) for item in value) or "none"
    return str(value)


def section(anchor: str, title: str, *children: Content) -> Markup:
    """Return a titled part of the page that the table of contents can point at."""
    return tag(
        "section", tag("h2", title, id=f"{anchor}-title"), *children, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def sentences(parts: Iterable[Content]) -> Markup:
    """Return a paragraph of quiet explanation."""
    return tag("p", join(parts), class_="note")
