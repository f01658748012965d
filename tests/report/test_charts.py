from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from slope_compile.report.charts import Band, Line, bar_chart, line_chart, sparkline, ticks, waterfall_bar

finite = st.floats(-1e29, 1e29, allow_subnormal=False)


@given(finite, finite)
def test_ticks_cover_the_values_in_even_steps(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    assume(high == 0 or high - low > 1e-5 * max(abs(low), abs(high)))
    marks, decimals = ticks(low, high)
    assert marks[0] <= low + 1e-6 * (high - low) and marks[-1] >= high - 1e-6 * (high - low)
    assert 2 <= len(marks) <= 7 and marks == sorted(set(marks))
    if decimals < 20:
        assert len({f"{mark:.{decimals}f}" for mark in marks}) == len(marks)


@pytest.mark.parametrize(
    ("low", "high", "expected", "decimals"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1.0], 2),
        (60, 98, [60, 70, 80, 90, 100], 0),
        (0.92, 1.0, [0.92, 0.94, 0.96, 0.98, 1.0], 2),
    ],
)
def test_ticks_are_the_numbers_a_person_would_choose(
    low: float, high: float, expected: list[float], decimals: int
) -> None:
    assert ticks(low, high) == (pytest.approx(expected), decimals)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-300])
def test_a_flat_curve_has_a_scale(value: float) -> None:
    marks, _ = ticks(value, value)
    assert marks[0] < marks[-1]


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The runs of points that the first path draws."""
    path = re.search(r'd="([^"]*)"', svg)
    assert path is not None
    runs = [run for run in path[1].split("M") if run]
    return [[tuple(map(float, point.split())) for point in run.split("L")] for run in runs]  # type: ignore[misc]


def test_a_curve_goes_where_its_values_say() -> None:
    svg = line_chart("c", [Line("loss", [2.0, 1.0, 0.0])], [Band(0, 1, "FP32"), Band(2, 2, "SLOPE")])
    (run,) = points(svg)
    xs, ys = zip(*run, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    assert ys[0] < ys[1] < ys[2] and ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.11)
    assert (ys[0], ys[2]) == (26.0, 194.0)
    assert "FP32" in svg and "SLOPE" in svg


def test_missing_values_leave_a_gap() -> None:
    runs = points(line_chart("c", [Line("loss", [1.0, 2.0, math.nan, 3.0, None, math.inf, 1e300, 2.0])]))
    assert [len(run) for run in runs] == [2, 1, 1]


@example([5e-324])
@given(st.lists(st.none() | st.floats(), min_size=1, max_size=50))
def test_any_values_make_a_chart_or_a_sentence(values: list[float | None]) -> None:
    svg = line_chart("c", [Line("x", values, "thin"), Line("y", values)], scale=100)
    root = ElementTree.fromstring(svg)
    if root.tag == "p":
        assert not [v for v in values if v is not None and math.isfinite(v) and abs(v) < 1e30]
        return
    for run in points(svg):
        assert all(47.9 <= x <= 388.1 and 25.9 <= y <= 194.1 for x, y in run)
    ElementTree.fromstring(sparkline("s", values, 0.0, 1.0))


def test_bars_are_as_long_as_the_value_is_below_one() -> None:
    svg = bar_chart("c", [("a", 0.90, "0.9000"), ("b", 0.95, "0.9500"), ("c" * 80, 1.0, "1.0000")])
    bars = [(float(r.get("x", "")), float(r.get("width", ""))) for r in ElementTree.fromstring(svg).iter("rect")]
    assert bars[0][1] == pytest.approx(2 * bars[1][1], abs=0.1) and bars[2][1] == 1.0
    assert bars[0][0] + bars[0][1] == pytest.approx(bars[1][0] + bars[1][1], abs=0.1)
    assert "c" * 23 not in re.sub(r"<title>.*?</title>", "", svg)


@pytest.mark.parametrize(
    ("share", "before", "expected"),
    [
        (0.25, 1.0, [("track", 0, 100), ("gone", 0, 100), ("fill", 0, 25)]),
        (0.5, 0.25, [("track", 0, 100), ("fill", 0, 50), ("grown", 25, 25)]),
        (0.25, 0.25, [("track", 0, 100), ("fill", 0, 25)]),
        (0.0, 0.0, [("track", 0, 100), ("fill", 0, 0.5)]),
    ],
)
def test_a_waterfall_bar_shows_what_went_and_what_came(
    share: float, before: float, expected: list[tuple[str, float, float]]
) -> None:
    svg = ElementTree.fromstring(waterfall_bar(share, before))
    rects = [(r.get("class"), float(r.get("x", "")), float(r.get("width", ""))) for r in svg.iter("rect")]
    assert rects == expected
    assert svg.get("aria-hidden") == "true"  # the numbers stand beside it
