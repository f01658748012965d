from __future__ import annotations

import math
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_compile.report.figures import number, percent, plural, ratio, real, significant, size
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
    assert (
        percent(0.97222) == "97.22\N{NO-BREAK SPACE}%" and percent(None) == "–" and percent(math.nan) == "not a number"
    )
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


def test_text_from_the_right_moves_nothing_beside_it() -> None:
    hebrew, arabic = "\u05d0\u05d1\u05d2", "\u0627\u0644"
    assert escape(f"{hebrew} {arabic}: 2") == f"\u2068{hebrew} {arabic}\u2069: 2"
    assert escape(f"a {hebrew}1{arabic}") == f"a \u2068{hebrew}\u20691\u2068{arabic}\u2069"
    assert escape("gpj\u202etxt.exe\u2066\u200f") == "gpj\ufffdtxt.exe\ufffd\ufffd"
    assert tag("p", escape(hebrew)) == f"<p>\u2068{hebrew}\u2069</p>"  # once is enough


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
        for step in ("h0", "h1", "h2", "h3", "h4"):
            assert contrast(scheme["htext"], scheme[step]) >= 4.5, (step, scheme)
        assert contrast(scheme["h5text"], scheme["h5"]) >= 4.5, scheme
        # What is drawn and not written: 3:1 against the page.
        for drawn in ("accent", "second", "pass", "fail", "open", "h5"):
            assert contrast(scheme[drawn], scheme["page"]) >= 3.0, (drawn, scheme)


def test_the_colours_of_the_heat_map_go_one_way() -> None:
    style = resources.files("slope_compile.report").joinpath("style.css").read_text(encoding="utf-8")
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        scheme = dict(re.findall(r"--(\w+): (#\w{6});", block))
        away = [contrast(scheme["page"], scheme[f"h{step}"]) for step in range(5)]
        assert away == sorted(away) and len(set(away)) == 5


def test_figures_that_are_not_finite_come_as_text() -> None:
    assert math.isnan(real("nan") or 0) and real("inf") == math.inf and real("-inf") == -math.inf
    assert real(1) == 1.0 and real("1") is None and real(True) is None and real(None) is None
