"""`metric`: on the whole validation split the ONNX model is as good as the trained one, and close enough to FP32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from slope_compile.errors import ArtifactError, DataError
from slope_compile.verify.runners import TorchRunner, input_names, quiet
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, reason

if TYPE_CHECKING:
    from torch import nn

NAME = "metric"
FLOAT_SLACK = 1e-9  # a drop of exactly the budget is within it, whatever the division's last bit
Batch = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class MetricTask:
    """What the task metric is measured on and compared with.

    Args:
        batches: Gives the validation split anew: images float32 (n, 3, h, w) and labels (n,).
        items: How many images that are.
        budget: Largest allowed relative drop, `verify.metric_drop`.
        fp32: Accuracy of the FP32 model, as measured by training; None if none was trained.
        compressed: Accuracy of the compressed torch model, as measured by training; None: it is measured here.
    """

    batches: Callable[[], Iterable[Batch]]
    items: int
    budget: float
    fp32: float | None = None
    compressed: float | None = None


def check_metric(
    task: Once[MetricTask] | None,
    session: Once[ort.InferenceSession],
    model: Once[nn.Module] | None,
    progress: Callable[[float], None],
) -> Check:
    """Compare the ONNX model's accuracy with the trained model's and with FP32: each drop within the budget.

    Args:
        task: The validation split and what training measured on it.
        session: The ONNX file in ONNX Runtime, optimizations disabled.
        model: The trained model, asked only where training left no accuracy of its own.
        progress: Told which share of the split is done.
    """
    if task is None:
        raise NotCheckedError("no validation data was given")
    run = session()
    try:
        given = task()
        if given.items == 0:
            raise NotCheckedError("the validation split is empty")
        onnx, trained = _measure(given, run, model, progress)
    except DataError as error:
        raise NotCheckedError(f"the validation data cannot be read: {reason(error)}") from None
    return _judge(onnx, given.compressed if given.compressed is not None else trained, given)


def _measure(
    task: MetricTask, session: ort.InferenceSession, model: Once[nn.Module] | None, progress: Callable[[float], None]
) -> tuple[float, float | None]:
    """Return the accuracies of the ONNX model and, where training left none, of the trained one; batch by batch."""
    (name,) = input_names(session)
    onnx = trained = seen = 0
    with ExitStack() as stack:
        stack.enter_context(quiet())
        runner = None
        if task.compressed is None and model is not None:
            runner = stack.enter_context(TorchRunner(model(), session))
        for images, labels in task.batches():
            onnx += _right(session.run(None, {name: images})[0], labels)
            if runner is not None:
                trained += _right(next(iter(runner.infer({name: images}).values())), labels)
            seen += len(labels)
            progress(seen / task.items)
    if seen != task.items:
        raise DataError(f"The validation split gave {seen} of {task.items} items.", "Check the data set.")
    return onnx / seen, trained / seen if runner is not None else None


def _judge(onnx: float, compressed: float | None, task: MetricTask) -> Check:
    references = {"FP32": task.fp32, "the trained model": compressed}
    drops = {whose: _drop(value, onnx) for whose, value in references.items() if value is not None}
    if not drops:
        raise NotCheckedError("there is no accuracy to compare with, neither FP32's nor the trained model's")
    figures = {
        "fp32": task.fp32,
        "compressed": compressed,
        "onnx": round(onnx, 6),
        "drop": round(drops["FP32"], 6) + 0.0 if "FP32" in drops else None,
        "drop_from_compressed": round(drops["the trained model"], 6) + 0.0 if "the trained model" in drops else None,
        "budget": task.budget,
        "items": task.items,
    }
    over = [
        f"accuracy {onnx:.4f} is {drop:.2%} below {whose} ({references[whose]:.4f}); allowed {task.budget:.2%}"
        for whose, drop in drops.items()
        if not drop <= task.budget + FLOAT_SLACK  # also where an accuracy is NaN
    ]
    if over:
        return Check(NAME, "fail", listed(over), figures)
    against = ", ".join(f"{whose} {references[whose]:.4f}" for whose in drops)
    return Check(
        NAME, "pass", f"accuracy {onnx:.4f} on {task.items} images ({against}), drop within {task.budget:.2%}", figures
    )


def _drop(reference: float, found: float) -> float:
    """Return the relative drop; negative where the tested model is better."""
    return (reference - found) / reference if reference else 0.0


def _right(score: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> int:
    """Return how many items have their largest score, (n, classes), at the label, (n,)."""
    if score.ndim != 2 or len(score) != len(labels):
        raise ArtifactError(f"The model's output has shape {score.shape} for {len(labels)} images.", "Export it again.")
    if not np.all(np.isfinite(score)):
        raise ArtifactError("The model's output has NaN or infinite values.", "Export it again.")
    return int(np.count_nonzero(np.argmax(score, axis=1) == labels))
