"""`metric`: on the whole validation split the ONNX model is as good as the trained one, and close enough to FP32.

It passes by the drops that were measured; how far chance reaches in them is told beside (bootstrap.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from slope_compile.errors import ArtifactError, DataError
from slope_compile.metric_names import words
from slope_compile.train.validation import Answers, Classified
from slope_compile.verify.chain.runners import Arrays, TorchRunner, input_names, output_names, quiet
from slope_compile.verify.metric.bootstrap import Interval, items_to_tell
from slope_compile.verify.metric.intervals import Intervals, intervals, measured
from slope_compile.verify.require import FP32, JUDGED_AGAINST
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, reason

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn

NAME = "metric"
TRAINED = "the trained model"  # beside FP32's, whose metrics the ONNX model's are compared with
FLOAT_SLACK = 1e-9  # a drop of exactly the budget is within it, whatever the division's last bit
SAME = 1e-6  # figures that agree so far are the same one: training keeps float32
RECORD_REMEDY = "Make them anew with `slope-compile train`."
NO_RECORD = "training kept no answers to single images"
Batch = tuple[npt.NDArray[np.float32], Any]  # images (n, 3, h, w), and what is right for them, of length n


class Score(Protocol):
    """Adds up how well a model answers."""

    def update(self, outputs: Arrays, truth: Any) -> None:
        """Add a batch's outputs, in the order in which the model gives them."""
        ...

    def compute(self) -> Mapping[str, float]:
        """Return metric -> figure over what was added."""
        ...

    def answers(self) -> Answers:
        """Return what was answered to each item; after `compute`."""
        ...


class Accuracy:
    """Share of images whose largest score, (n, classes), is at the label, (n,)."""

    def __init__(self) -> None:
        self._labels: list[npt.NDArray[np.int32]] = []
        self._predictions: list[npt.NDArray[np.int32]] = []

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
        self._labels.append(truth.astype(np.int32))
        self._predictions.append(np.argmax(score, axis=1).astype(np.int32))

    def compute(self) -> Mapping[str, float]:
        """Return {"accuracy"}."""
        return {"accuracy": float(self.answers().right.mean())}

    def answers(self) -> Classified:
        """Return the classes."""
        return Classified(np.concatenate(self._labels), np.concatenate(self._predictions))


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
        record: What both models answered to each item when training measured them, `fp32` and `compressed`; or why
            that is not known.
    """

    batches: Callable[[], Iterable[Batch]]
    items: int
    budget: float
    fp32: float | None = None
    compressed: float | None = None
    metric: str = "accuracy"
    score: Callable[[], Score] = Accuracy
    others: Mapping[str, References] = field(default_factory=dict)
    record: Mapping[str, Answers] | str = NO_RECORD


@dataclass(frozen=True)
class _Measured:
    """A model's figures, and the answers to single items that they come from."""

    figures: Mapping[str, float]
    answers: Answers


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
    compressed = given.compressed if trained is None else trained.figures[given.metric]
    return _judge(onnx, trained, {given.metric: References(given.fp32, compressed), **given.others}, given)


def _measure(
    task: MetricTask, session: ort.InferenceSession, model: Once[nn.Module] | None, progress: Callable[[float], None]
) -> tuple[_Measured, _Measured | None]:
    """Measure the ONNX model and, where training left no accuracy of it, the trained one; batch by batch."""
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
    both = [_Measured(score.compute(), score.answers()) for score in ([onnx, trained] if runner else [onnx])]
    return both[0], both[1] if runner else None


@dataclass(frozen=True)
class _Row:
    """One metric: the ONNX model's value, its references by whose they are, the relative drops and their intervals."""

    metric: str
    onnx: float
    references: Mapping[str, float]
    chance: Intervals
    budget: float
    items: int

    @property
    def drops(self) -> dict[str, float]:
        return {whose: _drop(value, self.onnx) for whose, value in self.references.items()}

    @property
    def over(self) -> dict[str, float]:
        """Drops beyond the budget; one that is NaN is."""
        return {whose: drop for whose, drop in self.drops.items() if not self.within(drop)}

    def within(self, value: float) -> bool:
        return value <= self.budget + FLOAT_SLACK

    def open(self, whose: str) -> bool:
        """Whether chance alone could have put the drop on its side of the budget."""
        interval = self.chance.drops[whose]
        return self.within(interval.low) and not self.within(interval.high)

    @property
    def certain(self) -> bool | None:
        """Whether other images of this kind would give the same verdict; None: it is not known."""
        if not self.chance.drops:
            return None
        sure = [not self.open(whose) for whose in self.chance.drops]
        over = [whose for whose in self.over if whose in self.chance.drops and not self.open(whose)]
        return bool(over) or (all(sure) and not self.over and len(sure) == len(self.references))

    def figures(self) -> dict[str, Any]:
        drops = {whose: round(drop, 6) + 0.0 for whose, drop in self.drops.items()}
        found = {
            "fp32": self.references.get(FP32),
            "compressed": self.references.get(TRAINED),
            "onnx": round(self.onnx, 6),
            "drop": drops.get(FP32),
            "drop_from_compressed": drops.get(TRAINED),
            "interval": _ends(self.chance.drops.get(FP32)),
            "interval_from_compressed": _ends(self.chance.drops.get(TRAINED)),
            "accuracy_interval": _ends(self.chance.own),
            "resamples": self.chance.own.resamples,
            "certain": self.certain,
        }
        return {**found, "interval_reason": self.chance.missing} if self.chance.missing else found

    def against(self) -> str:
        return ", ".join(f"{whose} {value:.4f}" for whose, value in self.references.items())

    def reach(self, name: str) -> str:
        """Say how far chance reaches: the interval of one drop, and whether so many images can tell.

        Args:
            name: Of the metric, where there are several.
        """
        if not self.chance.drops:
            return f"no interval: {self.chance.missing}"
        unsure = [whose for whose in self.chance.drops if self.open(whose)]
        whose = (unsure or list(self.chance.drops))[0]
        interval = self.chance.drops[whose]
        said = f"95 % interval of the drop{name} from {whose} {interval.low:.2%} to {interval.high:.2%}"
        if not unsure:
            return said
        needed = items_to_tell(self.drops[whose], interval, self.budget, self.items)
        would = f", about {needed} would" if needed else ""
        return f"{said}: {self.items} images cannot tell on which side of {self.budget:.2%} it is{would}"


def _judge(onnx: _Measured, trained: _Measured | None, references: Mapping[str, References], task: MetricTask) -> Check:
    known, missing = _known(onnx, trained, references, task)
    rows: list[_Row] = []
    for metric, values in references.items():
        named = {FP32: values.fp32, TRAINED: values.compressed}
        compared = {whose: value for whose, value in named.items() if value is not None}
        if not rows and not compared:
            raise NotCheckedError(
                f"there is no {words(metric)} to compare with, neither FP32's nor the trained model's"
            )
        answered = {whose: answers for whose, answers in known.items() if whose in compared}
        lacking = missing if len(answered) < len(compared) else ""
        chance = intervals(metric, onnx.answers, answered, lacking)
        rows.append(_Row(metric, onnx.figures[metric], compared, chance, task.budget, task.items))
    return _verdict(rows, task)


def _verdict(rows: list[_Row], task: MetricTask) -> Check:
    first = rows[0]
    figures = {**first.figures(), JUDGED_AGAINST: list(first.references), "budget": task.budget, "items": task.items}
    if task.metric != "accuracy":
        figures |= {"metric": task.metric, **{row.metric: row.figures() for row in rows[1:]}}
    over = [
        f"{words(row.metric)} {row.onnx:.4f} is {drop:.2%} below {whose} ({row.references[whose]:.4f}); "
        f"allowed {task.budget:.2%}"
        for row in rows
        for whose, drop in row.over.items()
    ]
    reach = "; ".join(dict.fromkeys(row.reach(f" of {words(row.metric)}" if len(rows) > 1 else "") for row in rows))
    alone = [words(row.metric) for row in rows if FP32 not in row.references]
    if alone:
        reach += f"; judged against {TRAINED} alone: there is no {' and no '.join(alone)} of FP32 to compare with"
    if over:
        return Check(NAME, "fail", f"{listed(over)}; {reach}", figures)
    others = "".join(f", {words(row.metric)} {row.onnx:.4f} ({row.against()})" for row in rows[1:])
    found = f"{words(first.metric)} {first.onnx:.4f} on {task.items} images ({first.against()}){others}"
    return Check(NAME, "pass", f"{found}, drop within {task.budget:.2%}; {reach}", figures)


def _known(
    onnx: _Measured, trained: _Measured | None, references: Mapping[str, References], task: MetricTask
) -> tuple[dict[str, Answers], str]:
    """Return whose answers to single items are known, and why others' are not.

    Raises:
        ArtifactError: If a figure is not what the recorded answers give, or they are of other items or of another kind
            of task.
    """
    found = {} if trained is None else {TRAINED: trained.answers}
    if isinstance(task.record, str):
        return found, task.record
    for whose, model in ((FP32, "fp32"), (TRAINED, "compressed")):
        answers = task.record[model]
        if answers.answers().keys() != onnx.answers.answers().keys():
            raise ArtifactError("The recorded answers to single images are of another kind of task.", RECORD_REMEDY)
        for metric, values in references.items():
            value, told = getattr(values, model), measured(metric, answers)
            if value is None and model == "fp32":  # training writes no answers without their figure
                raise ArtifactError(
                    f"{whose} has recorded answers, and no figure of its {words(metric)}.", RECORD_REMEDY
                )
            if value is not None and abs(value - told) > SAME:
                raise ArtifactError(  # training wrote both: one of them was edited since
                    f"{words(metric)} of {whose} is {value:.4f}, and {told:.4f} by its recorded answers.",
                    RECORD_REMEDY,
                )
        if other := _other_items(answers, onnx.answers):
            raise ArtifactError(  # the sources are those of training: one of the two was edited since
                f"The recorded answers contradict the validation split, which has not changed since training: {other}.",
                RECORD_REMEDY,
            )
        found.setdefault(whose, answers)
    return found, ""


def _other_items(recorded: Answers, here: Answers) -> str:
    """Say how the items of two measurements differ, by what is right for them; empty: they do not."""
    if recorded.items != here.items:
        return f"{here.items} images, {recorded.items} then"
    then, now = recorded.truth(), here.truth()
    if isinstance(recorded, Classified):
        unlike = int(np.count_nonzero(then["truth.labels"] != now["truth.labels"]))
        return f"the labels of {unlike} of {here.items} images differ" if unlike else ""
    return "" if all(np.array_equal(then[name], now[name]) for name in then) else "it holds other objects"


def _ends(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [round(interval.low, 6) + 0.0, round(interval.high, 6) + 0.0]


def _drop(reference: float, found: float) -> float:
    """Return the relative drop; negative where the tested model is better."""
    return (reference - found) / reference if reference else 0.0
