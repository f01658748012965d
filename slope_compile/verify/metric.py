"""`metric`: on the whole validation split the ONNX model is as good as the trained one, and close enough to FP32."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slope_compile.errors import ArtifactError, DataError
from slope_compile.metric_names import words
from slope_compile.verify.runners import Arrays, TorchRunner, input_names, output_names, quiet
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, reason

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn

NAME = "metric"
FLOAT_SLACK = 1e-9  # a drop of exactly the budget is within it, whatever the division's last bit
Batch = tuple[npt.NDArray[np.float32], Any]  # images (n, 3, h, w), and what is right for them, of length n


class Score(Protocol):
    """Adds up how well a model answers."""

    def update(self, outputs: Arrays, truth: Any) -> None:
        """Add a batch's outputs, in the order in which the model gives them."""
        ...

    def compute(self) -> Mapping[str, float]:
        """Return metric -> figure over what was added."""
        ...


class Accuracy:
    """Share of images whose largest score, (n, classes), is at the label, (n,)."""

    def __init__(self) -> None:
        self._right = self._seen = 0

    def update(self, outputs: Arrays, truth: npt.NDArray[np.int64]) -> None:
        """Add a batch.

        Raises:
            ArtifactError: If the scores have another shape, or are not finite.
        """
        score = next(iter(outputs.values()))
        if score.ndim != 2 or len(score) != len(truth):
            raise ArtifactError(
                f"The model's output has shape {score.shape} for {len(truth)} images.", "Export it again."
            )
        if not np.all(np.isfinite(score)):
            raise ArtifactError("The model's output has NaN or infinite values.", "Export it again.")
        self._right += int(np.count_nonzero(np.argmax(score, axis=1) == truth))
        self._seen += len(truth)

    def compute(self) -> Mapping[str, float]:
        """Return {"accuracy"}."""
        return {"accuracy": self._right / self._seen}


@dataclass(frozen=True)
class References:
    """One metric's values as measured by training: of the FP32 model and of the compressed torch model, None: not."""

    fp32: float | None = None
    compressed: float | None = None


@dataclass(frozen=True)
class MetricTask:
    """What the task metric is measured on and compared with.

    Args:
        batches: Gives the validation split anew: images float32 (n, 3, h, w) and what is right, labels (n,) for
            classification.
        items: How many images that are.
        budget: Largest allowed relative drop, `verify.metric_drop`.
        fp32: The metric of the FP32 model, as measured by training; None if none was trained.
        compressed: The metric of the compressed torch model, as measured by training; None: accuracy is measured here.
        metric: Its name in the score.
        score: Makes an empty score.
        others: Further metrics of the score that are judged alike: name -> references.
    """

    batches: Callable[[], Iterable[Batch]]
    items: int
    budget: float
    fp32: float | None = None
    compressed: float | None = None
    metric: str = "accuracy"
    score: Callable[[], Score] = Accuracy
    others: Mapping[str, References] = field(default_factory=dict)


def check_metric(
    task: Once[MetricTask] | None,
    session: Once[ort.InferenceSession],
    model: Once[nn.Module] | None,
    progress: Callable[[float], None],
) -> Check:
    """Compare the ONNX model's metrics with the trained model's and with FP32: each drop within the budget.

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
    compressed = given.compressed if given.compressed is not None else trained
    return _judge(onnx, {given.metric: References(given.fp32, compressed), **given.others}, given)


def _measure(
    task: MetricTask, session: ort.InferenceSession, model: Once[nn.Module] | None, progress: Callable[[float], None]
) -> tuple[Mapping[str, float], float | None]:
    """Return the ONNX model's figures and, where training left none, the trained one's accuracy; batch by batch."""
    (name,), names = input_names(session), output_names(session)
    onnx, trained, seen, runner = task.score(), task.score(), 0, None
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if task.compressed is None and model is not None and task.metric == "accuracy":
            runner = stack.enter_context(TorchRunner(model(), session))
        for images, truth in task.batches():
            onnx.update(dict(zip(names, session.run(None, {name: images}), strict=True)), truth)
            if runner is not None:
                trained.update(runner.infer({name: images}), truth)
            seen += len(truth)
            progress(seen / task.items)
    if seen != task.items:
        raise DataError(f"The validation split gave {seen} of {task.items} items.", "Check the data set.")
    return onnx.compute(), trained.compute()[task.metric] if runner is not None else None


@dataclass(frozen=True)
class _Row:
    """One metric: the ONNX model's value, its references by whose they are, the relative drops."""

    metric: str
    onnx: float
    references: Mapping[str, float]

    @property
    def drops(self) -> dict[str, float]:
        return {whose: _drop(value, self.onnx) for whose, value in self.references.items()}

    def figures(self) -> dict[str, Any]:
        drops = {whose: round(drop, 6) + 0.0 for whose, drop in self.drops.items()}
        return {
            "fp32": self.references.get("FP32"),
            "compressed": self.references.get("the trained model"),
            "onnx": round(self.onnx, 6),
            "drop": drops.get("FP32"),
            "drop_from_compressed": drops.get("the trained model"),
        }

    def against(self) -> str:
        return ", ".join(f"{whose} {value:.4f}" for whose, value in self.references.items())


def _judge(onnx: Mapping[str, float], references: Mapping[str, References], task: MetricTask) -> Check:
    rows = []
    for metric, known in references.items():
        named = {"FP32": known.fp32, "the trained model": known.compressed}
        rows.append(_Row(metric, onnx[metric], {whose: value for whose, value in named.items() if value is not None}))
    first = rows[0]
    if not first.references:
        raise NotCheckedError(
            f"there is no {words(first.metric)} to compare with, neither FP32's nor the trained model's"
        )
    figures = {**first.figures(), "budget": task.budget, "items": task.items}
    if task.metric != "accuracy":
        figures |= {"metric": task.metric, **{row.metric: row.figures() for row in rows[1:]}}
    over = [
        f"{words(row.metric)} {row.onnx:.4f} is {drop:.2%} below {whose} ({row.references[whose]:.4f}); "
        f"allowed {task.budget:.2%}"
        for row in rows
        for whose, drop in row.drops.items()
        if not drop <= task.budget + FLOAT_SLACK  # also where a figure is NaN
    ]
    if over:
        return Check(NAME, "fail", listed(over), figures)
    others = "".join(f", {words(row.metric)} {row.onnx:.4f} ({row.against()})" for row in rows[1:])
    found = f"{words(first.metric)} {first.onnx:.4f} on {task.items} images ({first.against()}){others}"
    return Check(NAME, "pass", f"{found}, drop within {task.budget:.2%}", figures)


def _drop(reference: float, found: float) -> float:
    """Return the relative drop; negative where the tested model is better."""
    return (reference - found) / reference if reference else 0.0
