from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import direction, make_run

from slope_compile.report.histogram import Direction, direction_histogram, direction_of
from slope_compile.report.page import render


def drawn(document: dict[str, Any]) -> tuple[str, str]:
    figure, counts = direction_histogram({"direction": document})
    return str(figure), str(counts)


def test_the_occupied_range_is_shown_and_nothing_is_lost() -> None:
    found = direction_of({"direction": direction()})
    assert found is not None and found.before is not None
    shown = found.trimmed()
    assert shown.before is not None
    assert (sum(shown.after), sum(shown.before)) == (sum(found.after), sum(found.before))
    assert shown.edges[0] == 0.88 and shown.edges[-1] == 1.0 and len(shown.after) == 24


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=200))
def test_any_counts_are_merged_without_loss(counts: list[tuple[int, int]]) -> None:
    before, after = ([pair[side] for pair in counts] for side in (0, 1))
    edges = [i / len(counts) for i in range(len(counts) + 1)]
    shown = Direction(edges, before, after).trimmed()
    assert shown.before is not None and len(shown.edges) == len(shown.after) + 1 == len(shown.before) + 1 <= 42
    assert (sum(shown.before), sum(shown.after)) == (sum(before), sum(after))
    assert list(shown.edges) == sorted(set(shown.edges))
    for low, high, count in zip(shown.edges, shown.edges[1:], shown.after, strict=False):  # each from its own bins
        assert count == sum(a for edge, a in zip(edges, after, strict=False) if low <= edge < high)


def test_bars_are_as_high_as_their_counts() -> None:
    edges = [0.0, 0.25, 0.5, 0.75, 1.0]
    figure, _ = drawn({"edges": edges, "before": [4, 0, 2, 0], "after": [1, 0, 2, 4]})
    svg = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", figure)[0])
    bars = {bar.findtext("title"): float(bar.get("height", "")) for bar in svg.iter("rect")}
    assert list(bars) == [
        "0.000 to 0.250: 1 after, 4 before",
        "0.500 to 0.750: 2 after, 2 before",
        "0.750 to 1.000: 4 after, 0 before",
    ]
    one, two, four = bars.values()
    assert two == pytest.approx(2 * one, abs=0.02) and four == pytest.approx(4 * one, abs=0.02)
    (outline,) = [path.get("d", "") for path in svg.iter("path")]
    tops = [194 - float(v) for v in re.findall(r"V([\d.]+)", outline)]
    assert tops == pytest.approx([four, 0, two, 0, 0], abs=0.1)


def test_it_is_told_in_words_and_as_a_table() -> None:
    figure, counts = drawn(direction())
    assert "have a cosine above 0.920 before, 0.950 after training" in figure
    assert "they have no direction (all codes zero): 0 filters before and 2 after" in figure
    assert "before: as compression begins" in figure and "after training" in figure
    rows = re.findall(
        r'<th scope="row">(.*?)</th><td>(.*?)</td><td class="n">(.*?)</td><td class="n">(.*?)</td>', counts
    )
    assert ("0.920", "0.925", "900", "18") in rows and len(rows) == 24


def test_a_run_resumed_from_an_older_state_has_no_before() -> None:
    figure, counts = drawn({**direction(), "before": None, "zero": {"before": None, "after": 0}})
    assert "the counts before were not kept" in figure and "as compression begins" not in figure
    assert "–" in counts and 'class="line before"' not in figure


def test_what_is_missing_is_said() -> None:
    run = make_run()
    assert run.metrics is not None
    old = {key: value for key, value in run.metrics.items() if key != "direction"}
    assert "this run was trained before they were counted" in render(make_run(metrics=old))
    none = {"edges": [0.0, 0.5, 1.0], "before": [0, 0], "after": [0, 0], "zero": {"before": 3, "after": 3}}
    assert "no filter has a direction" in direction_histogram({"direction": none})[0]
