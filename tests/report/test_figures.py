from __future__ import annotations

import math
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_compile.report.figures import number, percent, plural, ratio, significant, size
from slope_compile.report.markup import Markup, escape, join, tag


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.25, "1.2"),
        (-0.5, "−0.5"),
        (12345.6, "12,345.6"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
        (None, "–"),
        ("inf", "–"),
        (True, "–"),
    ],
)
def test_number(value: object, text: str) -> None:
    assert number(value, 1) == text


def test_other_figures() -> None:
    assert percent(0.97222) == "97.22 %" and percent(None) == "–" and percent(math.nan) == "not a number"
    assert significant(0.000123456) == "0.000123" and significant(math.inf) == "∞"
    assert plural(1, "layer") == "1 layer" and plural(0, "layer") == "0 layers"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_600, "1.00 MB"),
        (5_732_579, "5.73 MB"),
        (44_740_735, "44.7 MB"),
        (3 * 10**12, "3,000 GB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


def test_ratio() -> None:
    assert ratio(10, 78) == "7.8× smaller" and ratio(12, 10) == "1.2× larger" and ratio(10, 10) == "1×"
    assert ratio(10, None) == "–" and ratio(10, 0) == "–" and ratio(0, 10) == "–"


def test_tag_escapes_text_and_keeps_markup() -> None:
    inner = tag("b", "<i>")
    assert tag("p", "a & b", inner, None, 3, title='"') == '<p title="&quot;">a &amp; b<b>&lt;i&gt;</b>3</p>'
    assert (
        tag("td", class_="n", aria_hidden="true", open=True, id=None) == '<td class="n" aria-hidden="true" open></td>'
    )
    assert tag("rect", x=-0.001, y=1.50, width=2.0) == '<rect x="0" y="1.5" width="2"></rect>'
    assert isinstance(join(["<", inner]), Markup) and escape(inner) is inner


@given(st.text())
def test_escaped_text_holds_nothing_that_ends_a_text(text: str) -> None:
    assert not re.search("[<>\"'\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", escape(text))


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_in_every_scheme() -> None:
    style = resources.files("slope_compile.report").joinpath("style.css").read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        for text in ("text", "muted", "accent", "pass", "fail", "open"):
            for ground in ("page", "surface"):
                assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground, scheme)
