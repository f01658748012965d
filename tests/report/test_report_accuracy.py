from __future__ import annotations

import json
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import VERDICT, make_run

from slope_compile.report.accuracy import accuracy
from slope_compile.report.intervals import Dot, Rule, interval_chart

LONE: dict[str, Any] = {"drop_from_compressed": None, "interval_from_compressed": None}


def page(**figures: Any) -> str:
    """The section with other figures of the metric check; None takes one away."""
    verdict = json.loads(json.dumps(VERDICT))
    metric = verdict["checks"][-1]["figures"]
    for key, value in figures.items():
        metric[key] = value
        if value is None:
            del metric[key]
    return accuracy(make_run(verdicts={"a100": verdict})).replace("\N{NO-BREAK SPACE}", " ")


def text(section: str) -> str:
    return re.sub("<[^>]*>", "", section)


def charts(section: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", section)]


def test_an_interval_on_both_sides_of_the_budget_cannot_tell() -> None:
    told = text(page())
    assert "accuracy drops by 0.29 % against the FP32 model (−0.58 % to 1.16 %)" in told
    assert "by 0.00 % against the compressed model (−0.40 % to 0.40 %): 95 % intervals over 360 items" in told
    assert "○ cannot tell whether the drop from the FP32 model is within 1.0 %" in told and "for certain" not in told
    assert "95.28 % to 98.61 %" in told


@pytest.mark.parametrize(
    ("interval", "sentence"),
    [
        ([-0.004, 0.006], "✓ pass for certain: the intervals are within the 1.0 % allowed"),
        ([0.02, 0.04], "✗ FAIL for certain: a whole interval is beyond the 1.0 % allowed"),
    ],
)
def test_a_certain_interval_says_which_side(interval: list[float], sentence: str) -> None:
    told = text(page(interval=interval, drop=sum(interval) / 2, certain=True))
    assert sentence in told and "cannot tell" not in told


def test_the_dot_lies_on_its_value_and_the_whisker_on_its_interval() -> None:
    values, drop = charts(page())
    by_name = {group.findtext("title"): group for group in values.iter("g") if group.find("circle") is not None}
    assert list(by_name) == ["FP32: 97.50 %", "compressed: 97.22 %", "ONNX file: 97.22 %"]
    grid = {
        float("".join(mark.itertext()).removesuffix(" %")): float(mark.get("x", ""))
        for mark in values.iter("text")
        if mark.get("class") == "axis"
    }
    (low, at), (high, end) = min(grid.items()), max(grid.items())

    def place(percent: float) -> float:
        return at + (percent - low) / (high - low) * (end - at)

    circle = by_name["ONNX file: 97.22 %"].find("circle")
    assert circle is not None and float(circle.get("cx", "")) == pytest.approx(place(97.22), abs=0.1)
    whisker = by_name["ONNX file: 97.22 %"].findall("line")[0]
    ends = (float(whisker.get("x1", "")), float(whisker.get("x2", "")))
    assert ends == (pytest.approx(place(95.28), abs=0.1), pytest.approx(place(98.61), abs=0.1))
    rules = {group.findtext("text"): group.find("line") for group in values.iter("g") if group.find("text") is not None}
    budget = rules["least allowed"]
    assert budget is not None and float(budget.get("x1", "")) == pytest.approx(place(97.5 * 0.99), abs=0.1)
    assert "at most 1.0 % is allowed" in (drop.get("aria-label") or "")


def test_the_drop_that_cannot_be_told_is_the_one_that_is_named() -> None:
    told = text(page(interval=[-0.02, 0.005], interval_from_compressed=[-0.011, 0.011]))
    assert "cannot tell whether the drop from the compressed model is within" in told
    told = text(page(interval_from_compressed=[-0.011, 0.011]))
    assert "cannot tell whether the drop from the FP32 and from the compressed model is within" in told
    assert "cannot tell, as one of the two has no interval" in text(page(**LONE, interval=[-0.004, 0.004]))


@pytest.mark.parametrize(
    ("figures", "sentence"),
    [
        ({"interval": None, "accuracy_interval": None, "certain": None}, "there is no interval (the verification kept"),
        ({"interval": None, "interval_reason": "no items were kept"}, "there is no interval (no items were kept)"),
        ({"interval": ["nan", "nan"]}, "there is no interval"),
        ({"interval": [0.1]}, "there is no interval"),
        ({"interval": "x", "accuracy_interval": {"a": 1}}, "there is no interval"),
        ({"interval": [0.2, 0.1]}, "there is no interval"),
        ({"onnx": None}, "was not measured: no check of the metric ran"),
    ],
)
def test_without_an_interval_it_says_so(figures: dict[str, Any], sentence: str) -> None:
    section = page(**LONE, **figures)
    assert sentence in text(section) and len(charts(section)) == 1
    assert not re.search(r'="[^"]*\b(nan|inf)\b', section)


def test_an_interval_without_end_is_said_and_not_drawn() -> None:
    section = page(**LONE, interval=["-inf", "inf"], certain=False)
    assert "(−∞ to ∞)" in text(section)
    assert not re.search(r'(?:x1|x2|cx)="[^"]*(?:nan|inf)', section)


def test_each_metric_of_a_detector_has_its_own_interval() -> None:
    own = {"onnx": 0.31, "drop": 0.001, "interval": [-0.001, 0.004], "accuracy_interval": [0.29, 0.33], "certain": True}
    figures = {**own, "budget": 0.01, "box_map": {**own, "onnx": 0.35, "certain": False, "interval": [-0.1, 0.1]}}
    verdict = {"verdict": "pass", "checks": [{"name": "metric", "status": "pass", "detail": "", "figures": figures}]}
    run = make_run(
        verdicts={"a100": verdict},
        metric="mask_map",
        accuracies={"fp32": 0.3103, "onnx": 0.31},
        other_metrics={"box_map": {"fp32": 0.352, "onnx": 0.35}},
    )
    told = text(accuracy(run)).replace("\N{NO-BREAK SPACE}", " ")
    assert (
        told.count("for certain") == 1 and told.count("cannot tell") == 1 and "box mAP drops by 0.10 % against" in told
    )


finite = st.floats(-1e6, 1e6)


@given(
    st.lists(st.tuples(st.floats(), st.none() | st.tuples(st.floats(), st.floats())), max_size=4),
    st.lists(finite, max_size=3),
)
def test_any_values_make_a_chart_or_nothing(dots: list[Any], rules: list[float]) -> None:
    svg = interval_chart(
        "c", [Dot(f"d{i}", value, "t", within) for i, (value, within) in enumerate(dots)], [Rule("r", r) for r in rules]
    )
    if svg is None:
        assert not any(math.isfinite(value) and abs(value) < 1e30 for value, _ in dots)
        return
    root = ElementTree.fromstring(svg)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', svg)
    for circle in root.iter("circle"):
        assert 123.9 <= float(circle.get("cx", "")) <= 376.1
