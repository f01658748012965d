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
from slope_compile.verify.metric import MetricTask, check_metric
from slope_compile.verify.runners import reference_session
from slope_compile.verify.verdict import Check, NotCheckedError, Once, attempt

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
    assert check.figures == {
        "fp32": 0.95, "compressed": 0.9, "onnx": 0.9, "drop": 0.052632, "drop_from_compressed": 0.0,
        "budget": 0.1, "items": ITEMS,
    }  # fmt: skip


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
