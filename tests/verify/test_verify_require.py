"""Which checks can be required, and which there are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from prepared_runs import codes_of

from slope_compile.errors import RecipeError
from slope_compile.verify.model import verify_model
from slope_compile.verify.require import CHECKS, judge_required, parse_required


def test_names_and_families() -> None:
    assert parse_required(["metric", "codes", "metric"]) == ("metric", "codes")
    assert parse_required(["parity"]) == parse_required(["parity.*"]) == tuple(n for n in CHECKS if n[:7] == "parity.")
    assert parse_required(["parity.onnx", "parity"])[0] == "parity.onnx"
    assert parse_required([]) == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [("metrics", "'metric'"), ("parity.onx", "'parity.onnx'"), ("", "Known: "), ("metric.*", "'metric'")],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_required([name])
    assert said in refused.value.remedy


def test_only_a_pass_is_enough() -> None:
    checks = [{"name": name, "status": name, "detail": ""} for name in ("pass", "fail", "not checked")]
    met = {row["name"]: row["met"] for row in judge_required(["pass", "fail", "not checked", "absent"], checks)}
    assert met == {"pass": True, "fail": False, "not checked": False, "absent": False}


def test_a_metric_without_fp32_is_half_a_check() -> None:
    for against, met in ((["FP32", "the trained model"], True), (["the trained model"], False)):
        check = {"name": "metric", "status": "pass", "detail": "d", "figures": {"judged_against": against}}
        (row,) = judge_required(["metric"], [check])
        assert row == {"name": "metric", "status": "pass" if met else "not checked", "met": met, "detail": "d"}


def test_every_check_that_is_made_can_be_required(net: Callable[..., Path]) -> None:
    made = [check.name for check in verify_model(net(), codes=codes_of(net())).checks]
    assert made == [name for name in CHECKS if name != "placement" and not name.startswith("baseline.")]
