from __future__ import annotations

import re

import pytest
from hostile_runs import MARKUP, NAMES, hostile_run
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import check
from report_runs import FAILED, make_run

from slope_compile.report.page import render


@pytest.mark.parametrize("text", NAMES)
def test_names_stay_text_wherever_they_are_shown(text: str) -> None:
    page = render(hostile_run(text))
    clean = check(render(make_run(verdicts={"a100": FAILED})))
    document = check(page)
    assert {name for name, _ in document.elements} <= {name for name, _ in clean.elements}
    assert not re.search(r'="[^"]*\b(nan|inf)\b', " ".join(document.svgs))


def test_markup_is_shown_as_it_is_written() -> None:
    text = check(render(hostile_run(MARKUP))).text()
    assert text.count(MARKUP) > 20
    assert "not a number" in text and "∞" in text


@settings(max_examples=8, deadline=None)
@given(st.text(max_size=12))
def test_any_name_leaves_the_page_well_formed(text: str) -> None:
    check(render(hostile_run(text)))
