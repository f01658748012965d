"""HTML and SVG elements from which no text can escape.

Everything goes through `tag`: a child or attribute value is escaped unless it is `Markup`, and only `tag` makes that. A
page built from it is therefore well-formed and holds no markup that a layer name or a recipe brought in.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Union

VOID = frozenset({"br", "hr", "meta", "col"})

# What neither HTML nor XML takes as text: control characters, lone surrogates, non-characters.
_UNPRINTABLE = re.compile("[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


# Marks that turn the direction of what follows them, and letters that are written from the right.
_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LETTER = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
_FROM_THE_RIGHT = re.compile(f"[{_LETTER}](?:[{_LETTER} ]*[{_LETTER}])?")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = Union[str, int, None]  # noqa: UP007 - evaluated at run time, where Python 3.10 is the floor
Attribute = Union[str, int, float, bool, None]  # noqa: UP007


def escape(text: str) -> Markup:
    """Return `text` as HTML that shows exactly it, and leaves the order of its surroundings alone.

    Characters that no document may hold, and marks that would turn the direction of other text, become U+FFFD; words
    written from the right are isolated (U+2068, U+2069), so that figures beside them stay where they are.
    """
    if isinstance(text, Markup):
        return text
    shown = _TURNING.sub("\ufffd", _UNPRINTABLE.sub("\ufffd", text))
    return Markup(html.escape(_FROM_THE_RIGHT.sub("\u2068\\g<0>\u2069", shown), quote=True))


def join(parts: Iterable[Content]) -> Markup:
    """Return the parts side by side, each escaped unless it is markup; None stands for nothing."""
    return Markup("".join(escape(part if isinstance(part, str) else str(part)) for part in parts if part is not None))


def tag(name: str, /, *children: Content, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        name: The element's name, a literal of ours.
        children: Text (escaped), markup (kept) or None (nothing).
        attributes: `class_` becomes `class`, `aria_label` becomes `aria-label`; True is an attribute without a value;
            None and False leave it out. Floats are written with at most two decimals.
    """
    opening = name + "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup(f"<{opening}>") if name in VOID else Markup(f"<{opening}>{join(children)}</{name}>")


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{escape("0" if text == "-0" else text)}"'
