from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from verify_twins import CHANNELS, CLASSES, SIDE, make_twin

from slope_compile.errors import DataError
from slope_compile.train.validation import MODELS, Classified, Detected, Objects
from slope_compile.verify.chain.runners import reference_session
from slope_compile.verify.metric.bootstrap import accuracy_interval, drop_interval
from slope_compile.verify.metric.check import NO_RECORD, MetricTask, check_metric
from slope_compile.verify.verdict import Check, NotCheckedError, Once, Verdict, attempt

ITEMS, BATCH = 50, 16


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Once[Any]:
    path = make_twin().write(tmp_path_factory.mktemp("metric") / "m.onnx")
    return Once(lambda: reference_session(path))


def images() -> npt.NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal((ITEMS, CHANNELS, SIDE, SIDE), dtype=np.float32)


def answers() -> npt.NDArray[np.int64]:
    """What the model itself says: labels with which it is always right."""
    with torch.no_grad():
        return make_twin().model()(torch.from_numpy(images())).argmax(1).numpy()


def task(wrong: int = 0, **facts: Any) -> MetricTask:
    labels = answers()
    labels[:wrong] = (labels[:wrong] + 1) % CLASSES

    def batches() -> Iterator[Any]:
        for start in range(0, ITEMS, BATCH):
            yield images()[start : start + BATCH], labels[start : start + BATCH]

    return MetricTask(batches, **{"items": ITEMS, "budget": 0.1, **facts})


def judge(session: Once[Any], given: MetricTask | None, model: Once[Any] | None = None) -> Check:
    shares: list[float] = []
    loaded = None if given is None else Once(lambda: given)
    check = attempt("metric", lambda: check_metric(loaded, session, model, shares.append))
    if given is not None and check.status == "pass":
        assert shares == [16 / 50, 32 / 50, 48 / 50, 1]
    return check


def test_a_model_as_good_as_its_references_passes_with_all_figures(session: Once[Any]) -> None:
    check = judge(session, task(wrong=5, fp32=0.95, compressed=0.9))
    assert check.status == "pass"
    own = accuracy_interval(np.arange(ITEMS) >= 5)
    assert check.figures == {
        "fp32": 0.95, "compressed": 0.9, "onnx": 0.9, "drop": 0.052632, "drop_from_compressed": 0.0,
        "interval": None, "interval_from_compressed": None, "accuracy_interval": [own.low, own.high],
        "resamples": 10_000, "certain": None, "interval_reason": NO_RECORD, "budget": 0.1, "items": ITEMS,
        "judged_against": ["FP32", "the trained model"],
    }  # fmt: skip
    assert check.detail.endswith(f"drop within 10.00%; no interval: {NO_RECORD}")


def recorded(fp32: int, compressed: int, wrong: int = 0) -> dict[str, Classified]:
    """What two models answered that have the first images wrong, so many each; labels are those of `task(wrong)`."""
    labels = answers().astype(np.int32)
    labels[:wrong] = (labels[:wrong] + 1) % CLASSES
    predictions = [np.where(np.arange(ITEMS) < count, -1, labels).astype(np.int32) for count in (fp32, compressed)]
    return {name: Classified(labels, found) for name, found in zip(MODELS, predictions, strict=True)}


def test_recorded_answers_give_the_drops_their_intervals(session: Once[Any]) -> None:
    check = judge(session, task(wrong=5, fp32=0.96, compressed=0.9, record=recorded(2, 5, wrong=5)))
    right = {wrong: np.arange(ITEMS) >= wrong for wrong in (2, 5)}
    drop, same = drop_interval(right[2], right[5]), drop_interval(right[5], right[5])
    assert drop is not None and same is not None
    assert check.figures["interval"] == [round(drop.low, 6), round(drop.high, 6)]
    assert check.figures["interval_from_compressed"] == [round(same.low, 6), round(same.high, 6)]
    assert "interval_reason" not in check.figures
    assert drop.low < 0.1 < drop.high and check.figures["certain"] is False
    assert check.status == "pass"  # by the drop that was measured
    assert f"95 % interval of the drop from FP32 {drop.low:.2%} to {drop.high:.2%}: 50 images cannot" in check.detail
    assert check.detail.endswith("images cannot tell on which side of 10.00% it is, about 250 would")


@pytest.mark.parametrize(
    ("budget", "wrong", "status", "certain"),
    [(0.1, 0, "pass", True), (0.01, 0, "pass", False), (0.1, 30, "fail", True), (0.55, 30, "fail", False)],
)
def test_what_lies_on_one_side_of_the_budget_is_certain(
    session: Once[Any], budget: float, wrong: int, status: str, certain: bool
) -> None:
    """No change among 50 images leaves up to 7 % of such images in doubt; 30 that turned wrong leave none."""
    check = judge(session, task(wrong, budget=budget, fp32=1.0, compressed=1.0, record=recorded(0, 0, wrong)))
    assert (check.status, check.figures["certain"]) == (status, certain)
    assert ("cannot tell" in check.detail) is not certain
    assert "95 % interval" in check.detail


def test_a_model_measured_here_has_an_interval_without_a_record(session: Once[Any]) -> None:
    check = judge(session, task(wrong=5), Once(lambda: make_twin().model()))
    assert check.figures["interval"] is None and check.figures["interval_from_compressed"] is not None
    assert check.figures["certain"] is True and "interval_reason" not in check.figures


def test_a_record_that_contradicts_the_metrics_fails(session: Once[Any]) -> None:
    """Otherwise a lower FP32 figure, written by hand, would hide a drop."""
    check = judge(session, task(wrong=5, fp32=0.98, compressed=0.9, record=recorded(2, 5, wrong=5)))
    assert check.status == "fail"
    assert check.detail == "accuracy of FP32 is 0.9800, and 0.9600 by its recorded answers."


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (recorded(2, 5, wrong=7), "the labels of 2 of 50 images differ"),
        (
            {name: Classified(a.labels[1:], a.predictions[1:]) for name, a in recorded(0, 5).items()},
            "50 images, 49 then",
        ),
    ],
)
def test_a_record_that_contradicts_the_data_set_fails(
    session: Once[Any], record: dict[str, Classified], reason: str
) -> None:
    figures = {model: float(found.right.mean()) for model, found in record.items()}
    check = judge(session, task(wrong=5, record=record, **figures))
    assert check.status == "fail"
    assert check.detail.endswith(f"contradict the validation split, which has not changed since training: {reason}.")


def test_without_a_figure_of_fp32_it_is_said_that_half_of_the_check_was_made(session: Once[Any]) -> None:
    check = judge(session, task(wrong=5, compressed=0.9))
    assert check.status == "pass" and check.figures["judged_against"] == ["the trained model"]
    assert check.detail.endswith("judged against the trained model alone: there is no accuracy of FP32 to compare with")
    (row,) = Verdict((check,), ("metric",)).requirements()
    assert (row["status"], row["met"]) == ("not checked", False)


def test_recorded_answers_of_fp32_without_its_figure_fail(session: Once[Any]) -> None:
    """The figure was taken away: it would hide a drop."""
    check = judge(session, task(wrong=5, compressed=0.9, record=recorded(2, 5, wrong=5)))
    assert check.status == "fail" and "FP32 has recorded answers, and no figure of its accuracy" in check.detail


def test_a_record_of_another_task_fails(session: Once[Any]) -> None:
    detections = Detected(ITEMS, Objects(*[np.zeros(0, np.int32)] * 3), {})
    check = judge(session, task(wrong=5, fp32=0.9, compressed=0.9, record=dict.fromkeys(MODELS, detections)))
    assert check.status == "fail" and "another kind of task" in check.detail


def test_a_reference_without_a_right_answer_has_no_drop(session: Once[Any]) -> None:
    check = judge(session, task(wrong=5, fp32=0.0, compressed=0.9, record=recorded(ITEMS, 5, wrong=5)))
    assert check.status == "pass" and check.figures["interval"] is None
    assert check.figures["interval_reason"] == "FP32 has nothing to lose" and check.figures["certain"] is False


@pytest.mark.parametrize(("fp32", "status"), [(1.0, "pass"), (1.0 + 1e-6, "fail"), (0.8, "pass")])
def test_the_budget_is_a_relative_drop_and_its_edge_belongs_to_it(session: Once[Any], fp32: float, status: str) -> None:
    assert judge(session, task(wrong=5, fp32=fp32, compressed=0.9)).status == status


def test_a_drop_from_the_trained_model_fails_though_fp32_was_no_better(session: Once[Any]) -> None:
    check = judge(session, task(wrong=10, fp32=0.8, compressed=0.98))
    assert check.status == "fail"
    assert "the trained model (0.9800)" in check.detail and "FP32" not in check.detail


def test_the_trained_model_is_measured_where_training_left_no_accuracy(session: Once[Any]) -> None:
    check = judge(session, task(wrong=20), Once(lambda: make_twin().model()))
    assert check.status == "pass"
    assert check.figures["compressed"] == pytest.approx(0.6)
    assert check.figures["fp32"] is None and check.figures["drop"] is None


def test_without_data_or_reference_it_is_not_checked(session: Once[Any]) -> None:
    assert judge(session, None).status == "not checked"
    assert judge(session, task()).status == "not checked"  # neither accuracies nor a model to measure
    assert judge(session, task(items=0, fp32=1.0)).status == "not checked"


def test_data_that_cannot_be_read_is_not_the_models_fault(session: Once[Any]) -> None:
    def broken() -> Iterator[Any]:
        raise DataError("7.png does not decode.", "Remove it.")
        yield

    check = judge(session, MetricTask(broken, ITEMS, 0.1, fp32=1.0))
    assert check.status == "not checked"
    assert "7.png" in check.detail
    assert judge(session, task(items=ITEMS + 1, fp32=1.0)).status == "not checked"


def test_a_session_that_does_not_load_fails() -> None:
    def load() -> Any:
        raise ValueError("cut off")

    assert judge(Once(load), task(fp32=1.0)).status == "fail"


def test_nan_scores_fail(tmp_path: Path) -> None:
    twin = make_twin()
    twin.bias[2] = np.nan
    path = twin.write(tmp_path / "m.onnx")
    check = judge(Once(lambda: reference_session(path)), task(fp32=0.0))
    assert check.status == "fail"
    assert "NaN" in check.detail


def test_a_reference_of_zero_allows_no_division(session: Once[Any]) -> None:
    assert judge(session, task(fp32=0.0, compressed=0.5)).status == "pass"


def test_not_checked_is_raised_not_returned() -> None:
    with pytest.raises(NotCheckedError):
        check_metric(None, Once(lambda: pytest.fail("must not be loaded")), None, lambda _: None)
