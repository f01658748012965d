from __future__ import annotations

from typing import Any

import pytest

from slope_compile.build.gate import FIGURES, judge, parse_requirements, require_met
from slope_compile.errors import CheckFailedError, RecipeError


def row(name: str, placement: str, **engine: Any) -> dict[str, Any]:
    known = {"dtype": None, "fused": None, "held": True, "int8_product": False, "sparse_chosen": None}
    return {
        "name": name,
        "placement": placement,
        "bits": None if placement == "float" else 4,
        "fits_2_4": placement == "sparse-int8",
        "engine": {**known, "sparse_eligible": None, **engine},
    }


BUILT = {
    "summary": {
        "sparse": {"eligible": 3, "eligible_by": "log line", "chosen": 1, "chosen_by": "log line"},
        "int4": {"held": 2, "fused": 1},
        "int8": {"declared": 3, "multiplied": 2},
        "float": 1,
        "held": 4,
    },
    "layers": [
        row("a", "sparse-int8", dtype="Int8", int8_product=True, sparse_chosen=True, sparse_eligible=True),
        row("b", "sparse-int8", dtype="Int8", int8_product=True, sparse_chosen=False, sparse_eligible=True),
        row("c", "sparse-int8", dtype="Int8", sparse_chosen=False, sparse_eligible=True, held=False),
        row("d", "int4-weight", dtype="Int4", fused=True),
        row("e", "int4-storage", dtype="Int4", fused=False),
        row("head", "float", dtype="Half"),
    ],
}


def one(expression: str, built: Any = BUILT) -> Any:
    (judged,) = judge(parse_requirements([expression]), built)
    return judged


@pytest.mark.parametrize(
    ("expression", "figure", "met"),
    [
        ("sparse>=1", 1, True), ("sparse>=2", 1, False), ("sparse == 1", 1, True), (" sparse > 0 ", 1, True),
        ("sparse>1", 1, False), ("eligible>=3", 3, True), ("eligible<3", 3, False), ("int4>=1", 1, True),
        ("int4>=5", 1, False), ("int8>=2", 2, True), ("int8==3", 2, False), ("float<=1", 1, True),
        ("float==0", 1, False), ("float<1", 1, False), ("held>=4", 4, True), ("held>=5", 4, False),
    ],
)  # fmt: skip
def test_figures_and_operators(expression: str, figure: int, met: bool) -> None:
    judged = one(expression)
    assert (judged.figure, judged.met) == (figure, met)
    assert str(figure) in judged.detail
    assert judged.to_json()["expression"] == expression.replace(" ", "")


@pytest.mark.parametrize(
    ("expression", "blamed"),
    [
        ("sparse>=10", "not among them: b, c."), ("int4>=5", "not among them: a, b, c, e."),
        ("int8>=5", "not among them: c."), ("held>=5", "not among them: c."), ("float<1", "counted: head."),
        ("float==0", "counted: head."), ("eligible<=2", "counted: a, b, c."), ("float>=9", "not among them: a, b, c,"),
    ],
)  # fmt: skip
def test_the_layers_that_miss_are_named(expression: str, blamed: str) -> None:
    assert blamed in one(expression).detail


def test_many_layers_are_counted_not_listed() -> None:
    layers = [row(f"l{index}", "sparse-int8", sparse_chosen=False) for index in range(20)]
    detail = one("sparse>=2", {**BUILT, "layers": layers}).detail
    assert detail.endswith("l7 and 12 more.")


def test_what_is_not_checked_satisfies_nothing() -> None:
    sparse = {
        "eligible": None,
        "eligible_by": "not checked: no lines",
        "chosen": None,
        "chosen_by": "not checked: later",
    }
    nowhere = {"float": None, "held": None, "read_from": "nowhere", "not_found": ["d"]}
    figures = {"sparse": sparse, "int4": {"fused": None}, "int8": {"multiplied": None}, **nowhere}
    unknown = {"summary": figures, "layers": [row("d", "int4-weight", held=False)]}
    for expression in (
        "sparse>=0", "sparse<=5", "eligible>=0", "int4==0", "int8>=0", "float==0", "float<=9", "held>=0", "held<=9",
    ):  # fmt: skip
        judged = one(expression, unknown)
        assert (judged.figure, judged.met) == (None, False)
        assert "not checked" in judged.detail
        assert judged.to_json()["figure"] == "not checked"
    assert "not checked: later." in one("sparse>=0", unknown).detail
    for expression in ("float==0", "held>=0"):
        assert "neither the engine inspector nor the build log has a layer list" in one(expression, unknown).detail


def test_a_layer_whose_constant_was_not_found_may_be_a_float() -> None:
    summary = {**BUILT["summary"], "float": None, "read_from": "build log", "not_found": ["d"]}
    judged = one("float<=9", {**BUILT, "summary": summary})
    assert (judged.figure, judged.met) == (None, False)
    assert judged.detail == ("layers left in float are not checked: the engine's layer list shows no constant for d.")


def test_once_each_and_in_order() -> None:
    assert [str(r) for r in parse_requirements(["sparse>=10", "int4>=5", "sparse >= 10"])] == ["sparse>=10", "int4>=5"]


@pytest.mark.parametrize(
    "text", ["", "sparse", "sparse>=", ">=3", "sparse=3", "sparse=>3", "sparse!=3", "sparse>=-1", "sparse>=1.5",
             "sparse>=1e3", "sparse>=9999999999", "a b>=1", "sparse>=1 or 2"],
)  # fmt: skip
def test_no_expression(text: str) -> None:
    with pytest.raises(RecipeError, match="not of the form NAME OPERATOR NUMBER"):
        parse_requirements([text])


def test_a_misspelt_name() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'sparse'"):
        parse_requirements(["sparce>=1"])
    with pytest.raises(RecipeError, match="Known: eligible, float, held, int4, int8, sparse"):
        parse_requirements(["zebra>=1"])
    assert len(FIGURES) == 6


def test_a_gate_that_fails_says_all() -> None:
    judged = judge(parse_requirements(["sparse>=10", "int4>=1", "float<1"]), BUILT)
    with pytest.raises(CheckFailedError, match="a100 is built and does not hold") as caught:
        require_met(judged, "a100")
    assert "sparse>=10: 1 layers with a sparse kernel; not among them: b, c." in str(caught.value)
    assert "int4>=1" not in str(caught.value)
    require_met(judged[1:2], "a100")
