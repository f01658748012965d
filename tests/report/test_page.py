from __future__ import annotations

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_pages import check
from report_runs import LAYERS, VERDICT, make_run

from slope_compile.report.page import RunData, render


@pytest.fixture
def run() -> RunData:
    return make_run()


def test_a_whole_run(run: RunData) -> None:
    page = render(run)
    document = check(page)
    text = document.text()
    for words in ("Verdict: pass", "not checked", "there is no GPU here", "7 passed, 0 failed, 1 not checked"):
        assert words in text
    for words in ("44.7 MB", "5,732,579 B", "7.8× smaller", "97.22 %", "−0.28 points", "int4-storage", "97.50 %"):
        assert words in text
    for name, *_ in LAYERS:
        assert name in text
    assert "✗ NOT as declared" in text and "declared INT8, engine holds Float" in text
    assert "a100: TensorRT has no INT4 convolution" in text and "sparse kernel" in text
    assert "tensorrt-rtx 1.7.1, SM 8.0" in text and "chosen not checked: TensorRT-RTX" in text
    assert "INT4 fused in 0; float left in 1" in text and "dequantized apart" in text
    assert "10 of 11 coded layers held as declared" in text
    assert "4 FP32 epochs, 3 SLOPE epochs" in text
    assert len(page.encode()) < 100_000


def test_an_engine_that_was_not_read(run: RunData) -> None:
    builds = json.loads(json.dumps(run.builds))
    for build in builds.values():
        build["summary"] |= {"held": None, "not_held": None}
        for row in build["layers"]:
            row["engine"] |= {"dtype": None, "held": False, "note": "nothing found"}
    text = check(render(make_run(builds=builds))).text()
    assert "11 coded layers: not checked whether held as declared" in text and "not found" in text
    assert "✗ NOT as declared" not in text and "✓ held" not in text


def test_bits_of_activations_have_a_column_only_where_there_are_some(run: RunData) -> None:
    assert "Activations" not in render(run)
    metrics = json.loads(json.dumps(run.metrics))
    metrics["plan"][1] |= {"activation_bits": 4, "activation_reason": "input of a compressed layer"}
    metrics["plan"][2] |= {"activation_bits": None, "activation_reason": "left in float: never called"}
    text = check(render(make_run(metrics=metrics))).text()
    assert "Activations" in text
    assert "activations: input of a compressed layer" in text and "activations: left in float: never called" in text


def test_it_refers_to_nothing_outside(run: RunData) -> None:
    page = render(run)
    for forbidden in ("http:", "https:", "src=", "url(", "//", "@import", "<script", "data:"):
        assert forbidden not in page.lower(), forbidden
    assert "default-src &#x27;none&#x27;" in page


def test_the_same_run_gives_the_same_bytes(run: RunData) -> None:
    again = json.loads(json.dumps(dataclasses.asdict(run)))
    assert render(make_run()) == render(run)
    assert render(make_run(metrics=again["metrics"], layers=again["layers"], builds=again["builds"])) == render(run)


@pytest.mark.parametrize(
    "absent",
    [("metrics",), ("layers", "builds", "verdicts"), ("builds",), ("verdicts",), ("sizes", "accuracies", "versions")],
)
def test_a_partial_run_says_what_is_absent(absent: tuple[str, ...]) -> None:
    empty = {
        "metrics": None,
        "layers": None,
        "sizes": [],
        "builds": {},
        "verdicts": {},
        "accuracies": {},
        "versions": {},
    }
    document = check(render(make_run(**{name: empty[name] for name in absent})))
    text = document.text()
    assert ("Not verified" in text) == ("verdicts" in absent)
    assert ("No curves: this run has not been trained" in text) == ("metrics" in absent)
    assert ("not exported" in text) == ("layers" in absent)
    assert text.count("not run") == len({"metrics", "layers", "builds", "verdicts"} & set(absent))


def test_an_empty_run_invents_nothing() -> None:
    document = check(render(RunData("new", {})))
    text = document.text()
    assert text.count("not run") == 4
    assert "Not verified" in text and "0" not in re.sub(r"slope-compile [\d.]+", "", text)
    assert document.svgs == []


def test_a_failed_verdict_is_told_in_words_and_names_the_check() -> None:
    failed = {
        "name": "pattern",
        "status": "fail",
        "detail": "layer1.0.conv1.weight: 3 nonzeros in a group",
        "figures": {},
    }
    checks: list[Any] = [*VERDICT["checks"], failed]
    document = check(render(make_run(verdicts={"a100": VERDICT, "rtx": {"verdict": "fail", "checks": checks}})))
    text = document.text()
    assert "✗ Verdict: FAIL" in text and "Verdict: pass" not in text
    assert "rtx: pattern. layer1.0.conv1.weight: 3 nonzeros in a group" in text
    assert "a100, rtx: 14 passed, 1 failed, 2 not checked" in text


def test_not_finite_values_are_said_not_drawn() -> None:
    run = make_run()
    metrics = json.loads(json.dumps(run.metrics))
    metrics["layers"]["fc"] |= {"sqnr_db": math.inf, "cosine": math.nan}
    metrics["layers"]["conv1"] |= {"sqnr_db": "inf", "cosine": None}
    for epoch in metrics["epochs"]:
        epoch["loss"] = epoch["validation_loss"] = math.nan
    metrics["epochs"][5]["layers"]["conv1"] |= {"cosine": -math.inf, "step": math.nan, "flip_rate": None}
    document = check(render(make_run(metrics=metrics)))
    text = document.text()
    assert "∞" in text and "not a number" in text and "No finite value to draw" in text
    drawn = " ".join(document.svgs)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', drawn)


@pytest.mark.parametrize("bits", [None, 4])
def test_a_layer_in_float_is_called_float(bits: int | None) -> None:
    run = make_run()
    metrics = json.loads(json.dumps(run.metrics))
    metrics["plan"] = [{**metrics["plan"][0], "bits": bits, "pattern": None}]
    document = check(render(make_run(metrics=metrics, layers=None, builds={}, verdicts={})))
    assert ("float" in document.text()) == (bits is None)


EVIL = "<script>alert(1)</script>\"'&\x00\x1b[31m]]>--></style>\ud800"


def evil_run(text: str) -> RunData:
    """A run in which every text that a file could bring in is `text`."""

    def poison(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return text if isinstance(value, str) else value

    run = make_run()
    metrics = poison(json.loads(json.dumps(run.metrics)))
    for epoch in metrics["epochs"]:
        epoch["layers"] = {f"{text}{name}": values for name, values in epoch["layers"].items()}
    for index, row in enumerate(metrics["plan"]):
        row["name"] = f"{text}{LAYERS[index][0]}"
    metrics["layers"] = {f"{text}{name}": values for name, values in metrics["layers"].items()}
    layers = poison(json.loads(json.dumps(run.layers)))
    for index, row in enumerate(layers["layers"]):
        row["name"] = f"{text}{LAYERS[index][0]}.weight"
    sizes = [dataclasses.replace(row, stage=text, what=text) for row in run.sizes]
    return RunData(
        name=text,
        recipe={text: {text: text, "overrides": {text: {text: [text, None, True, 1e-9]}}}},
        metrics=metrics,
        layers=layers,
        builds={text: poison(json.loads(json.dumps(run.builds["a100"])))},
        verdicts={text: poison(json.loads(json.dumps(VERDICT)))},
        sizes=sizes,
        accuracies=run.accuracies,
        versions={text: text},
    )


def test_no_text_becomes_markup() -> None:
    clean, dirty = check(render(make_run())), check(render(evil_run(EVIL)))
    assert "<script>alert(1)</script>\"'&\ufffd\ufffd[31m" in dirty.text()
    assert {name for name, _ in dirty.elements} <= {name for name, _ in clean.elements} | {"ul", "li"}
    render(evil_run(EVIL)).encode()


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=12))
def test_any_text_leaves_the_page_well_formed(text: str) -> None:
    check(render(evil_run(text)))
