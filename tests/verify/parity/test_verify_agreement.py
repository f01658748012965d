from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verify_twins import make_twin

from slope_compile.verify.chain.places import DEFAULT, ENGINE, TRAINED, Chain
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.agreement import check_agreement, divergence
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, Once, attempt

SCORES = [[5.0, 4.0, 0.0], [-5.0, 1.0, 1.01]]
ALLOWED = Tolerance(0.01, "derived")  # of 5: eps is 0.05
ANYTHING = Tolerance(1.5, "jitter")  # nothing can be told from such outputs


def judge(trained: Any, deployed: Any, place: str, allowed: Tolerance) -> Check:
    runs = ([{"y": np.asarray(rows, np.float32)}] for rows in (trained, deployed))
    return judge_runs(*runs, place, allowed)


def judge_runs(trained: Any, deployed: Any, place: str, allowed: Tolerance) -> Check:
    rows = len(next(iter(trained[0].values())))
    model: Any = Once(lambda: None)
    chain = Chain(Path("m.onnx"), model, None, [{"x": np.zeros((rows, 1), np.float32)}])
    chain._runs = {TRAINED: Once(lambda: trained), DEFAULT: Once(lambda: deployed)}
    if place == ENGINE:
        chain.keep(ENGINE, deployed)
    return attempt("agreement", lambda: check_agreement(chain, lambda: allowed))


def test_an_engine_is_judged_by_what_the_hops_allow() -> None:
    found = judge(SCORES, [[5.04, 3.96, 0.0], [-5.0, 1.04, 0.97]], ENGINE, ALLOWED)
    assert found.status == "pass", found.detail
    figures = found.figures
    assert figures["turned"] == 1 and figures["top1_agreement"] == 0.5  # a decision by 0.01 may turn
    assert figures["turned_margin"] == pytest.approx(0.01) and figures["margin_allowed"] == pytest.approx(0.1)
    assert figures["kl_allowed"] == pytest.approx(0.05**2 / 2) and 0 < figures["kl_max"] <= figures["kl_allowed"]
    assert (figures["from"], figures["to"], figures["judged"]) == ("trained", "engine", True)


@pytest.mark.parametrize(
    ("deployed", "words"),
    [
        ([[3.9, 4.0, 0.0], SCORES[1]], "turns 1 decisions"),
        ([[9.0, 4.0, 0.0], SCORES[1]], "diverges by up to"),
        ([[9.0, 8.0, 4.0], SCORES[1]], "differs by 8.00e-01 of the largest output"),  # decides alike, all the same
    ],
)
def test_what_is_beyond_fails(deployed: Any, words: str) -> None:
    found = judge(SCORES, deployed, ENGINE, ALLOWED)
    assert found.status == "fail" and words in found.detail
    told = judge(SCORES, deployed, DEFAULT, ANYTHING)
    assert told.status == "not checked" and "told, not judged" in told.detail and told.figures["judged"] is False
    assert "kl_allowed" not in told.figures


def test_where_no_sample_is_decided_by_more_than_rounding_nothing_is_told() -> None:
    wide = Tolerance(0.9, "wide")  # of 5: 9 on both sides of a margin
    found = judge(SCORES, SCORES, DEFAULT, wide)
    assert found.status == "not checked" and found.figures["decided"] == 0
    assert "more than the trained model decides any sample by" in found.detail
    assert judge(SCORES, SCORES, DEFAULT, Tolerance(0.05, "less")).figures["decided"] == 1


def test_nothing_detected_is_nothing_compared() -> None:
    nothing = {name: np.zeros_like(array) for name, array in detections(0.9).items()}
    found = judge_runs([nothing], [nothing], DEFAULT, ALLOWED)
    assert found.status == "not checked" and "nothing is detected" in found.detail


def test_nan_fails_though_nothing_is_judged() -> None:
    found = judge(SCORES, [[np.nan, 4.0, 0.0], SCORES[1]], DEFAULT, ANYTHING)
    assert found.status == "fail" and "NaN" in found.detail


def test_outputs_that_are_no_scores_are_told_by_their_distance() -> None:
    found = judge([[[1.0, 2.0]]], [[[1.0, 2.1]]], DEFAULT, ANYTHING)
    assert found.status == "not checked" and "within 5.0e-02" in found.detail
    assert "kl_max" not in found.figures
    assert judge([[[1.0, 2.0]]], [[[1.0, 2.1]]], DEFAULT, ALLOWED).status == "fail"
    assert judge([[[1.0, 2.0]]], [[[1.0, 2.01]]], DEFAULT, ALLOWED).status == "pass"


def detections(score: float) -> dict[str, Any]:
    boxes, scores = np.zeros((1, 2, 4), np.float32), np.zeros((1, 2), np.float32)
    boxes[0, 0], scores[0, 0] = (1, 2, 30, 40), score
    return {"boxes": boxes, "labels": np.array([[1, 0]]), "scores": scores}


@pytest.mark.parametrize(("score", "partners", "status"), [(0.9001, 0, "pass"), (0.5, 2, "fail")])
def test_detections_are_paired(score: float, partners: int, status: str) -> None:
    told, judged = (
        judge_runs([detections(0.9)], [detections(score)], place, allowed)
        for place, allowed in ((DEFAULT, ANYTHING), (ENGINE, ALLOWED))
    )
    assert told.status == "not checked" and f"{partners} of 2 detections have no partner (told" in told.detail
    assert judged.status == status and judged.figures["off"] == partners
    assert "off_allowed" in judged.figures and "off_allowed" not in told.figures


def test_large_scores_do_not_overflow() -> None:
    assert divergence(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]]))[0] == pytest.approx(1e4)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.floats(1e-6, 3.0), st.integers(0, 2**32 - 1))
def test_the_bounds_hold_for_any_scores(classes: int, eps: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((32, classes)) * rng.uniform(0, 10)
    t = z + eps * rng.choice([-1.0, 1.0], z.shape) * rng.choice([1.0, rng.uniform()])
    assert divergence(z, t).max() <= eps**2 / 2 + 1e-12
    rows, a, b = np.arange(len(z)), z.argmax(1), t.argmax(1)
    assert (z[rows, a] - z[rows, b]).max() <= 2 * eps + 1e-12


def test_a_verification_tells_it_of_onnx_runtime(tmp_path: Path) -> None:
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors")
    found = verify_model(twin.write(tmp_path / "m.onnx"), golden=golden)["agreement"]
    assert found.status == "pass" and "onnx-default against the golden outputs on 5 samples" in found.detail
    assert found.figures["top1_agreement"] == 1 and found.figures["kl_max"] < 1e-10
    nothing = verify_model(tmp_path / "m.onnx")["agreement"]
    assert nothing.status == "not checked" and "golden" in nothing.detail
