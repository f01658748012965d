"""The plots: training curves, weight direction, step sizes and mask flips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from slope_compile.metric_names import title, words
from slope_compile.report.charts import Band, Line, bar_chart, drawable, line_chart, sparkline
from slope_compile.report.data import RunData
from slope_compile.report.figures import number, percent, plural, significant
from slope_compile.report.histogram import direction_histogram
from slope_compile.report.layers import layer_rows
from slope_compile.report.markup import Markup, tag
from slope_compile.report.tables import (
    Cell,
    absent,
    cell,
    code,
    column,
    details,
    figure_cell,
    section,
    sentences,
    table,
)

MANY_LAYERS = 32  # beyond it the per-layer curves start folded

Epochs = Sequence[Mapping[str, Any]]


def training(data: RunData) -> Markup:
    """Return loss and task metric over both phases, and the numbers behind them."""
    epochs: Epochs = (data.metrics or {}).get("epochs") or []
    if not epochs:
        return section("training", "Training", absent("No curves: this run has not been trained."))
    figures = [_loss_figure(epochs), _metric_figure(epochs, data.metric, data.accuracies.get("fp32"))]
    numbers = details("The numbers behind the curves", _epoch_table(epochs, data.metric))
    return section("training", "Training", tag("div", *figures, class_="charts"), numbers)


def _loss_figure(epochs: Epochs) -> Markup:
    trained = Line("training loss", [epoch.get("loss") for epoch in epochs])
    validated = Line("validation loss", [epoch.get("validation_loss") for epoch in epochs], "dashed")
    caption = f"Training loss over {plural(len(epochs), 'epoch')}, last {number(trained.values[-1], 3)}"
    known = any(map(drawable, validated.values))  # a detector has no validation loss
    chart = line_chart(caption, [validated, trained] if known else [trained], _bands(epochs))
    said = "; dashed: validation loss, which has no label smoothing" if known else ""
    return _figure("Loss", chart, f"{caption}{said}. The regularizer is not part of it")


def _metric_figure(epochs: Epochs, metric: str, fp32: float | None) -> Markup:
    heading = f"Validation {words(metric)}"
    reference = Line("FP32 model", [fp32] * len(epochs), "dashed")
    measured = Line(f"validation {words(metric)}", [epoch.get(metric) for epoch in epochs])
    caption = f"{heading} over {plural(len(epochs), 'epoch')}, last {percent(measured.values[-1])}"
    chart = line_chart(caption, [reference, measured], _bands(epochs), 100, " %")
    said = "; dashed: the FP32 model that compression started from" if fp32 is not None else ""
    return _figure(heading, chart, caption + said)


def _bands(epochs: Epochs) -> list[Band]:
    phases = [str(epoch["phase"]) for epoch in epochs]
    starts = [i for i, phase in enumerate(phases) if i == 0 or phase != phases[i - 1]]
    return [
        Band(start, end - 1, phases[start].upper())
        for start, end in zip(starts, [*starts[1:], len(phases)], strict=True)
    ]


def _epoch_table(epochs: Epochs, metric: str) -> Markup:
    validated = any("validation_loss" in epoch for epoch in epochs)  # a detector has none
    numbers = ("Loss", "Penalty", *(["Validation loss"] if validated else []), title(metric), "Learning rate")
    head = ["Epoch", "Phase", *(column(title) for title in numbers)]
    rows = [
        [
            str(index),
            str(epoch["phase"]).upper(),
            figure_cell(number(epoch.get("loss"), 4)),
            figure_cell(number(epoch.get("penalty"), 4)),
            *([figure_cell(number(epoch.get("validation_loss"), 4))] if validated else []),
            figure_cell(percent(epoch.get(metric))),
            figure_cell(significant(epoch.get("lr"))),
        ]
        for index, epoch in enumerate(epochs, 1)
    ]
    return table("Each epoch of training", head, rows)


def direction(data: RunData) -> Markup:
    """Return how near the compressed weights point to their latents: over epochs, and layer by layer at the end."""
    title = "Weight direction"
    first, epochs = _compressed_epochs(data)
    rows = [row for row in layer_rows(data) if drawable(row.cosine)]
    if not rows and not epochs:
        return section("direction", title, absent("Nothing to compare: this run has no compressed weights yet."))
    note = (
        "Compression turns a filter away from the weights that training moves; the cosine regularizer keeps the angle "
        "small. 1 means the same direction. A higher cosine is not by itself a better model: read it beside the "
        f"{words(data.metric)}."
    )
    histogram, counts = direction_histogram(data.metrics)
    figures = [histogram, _direction_over_epochs(first, epochs), _direction_bars(rows)]
    return section("direction", title, sentences([note]), tag("div", *figures, class_="charts"), counts)


def _direction_over_epochs(first: int, epochs: Epochs) -> Markup | None:
    series = _series(epochs, "cosine")
    if not series:
        return None
    means = [
        fmean(found) if (found := [v[i] for v in series.values() if drawable(v[i])]) else None
        for i in range(len(epochs))
    ]
    lines = [Line(name, values, "thin") for name, values in series.items()] + [Line("mean over layers", means)]
    caption = f"Cosine per epoch: mean over layers from {number(means[0], 4)} to {number(means[-1], 4)}"
    chart = line_chart(caption, lines, first_epoch=first)
    return _figure("Cosine over the compressed epochs", chart, f"{caption}. Thick: mean; thin: each layer.")


def _direction_bars(rows: Sequence[Any]) -> Markup | None:
    if not rows:
        return None
    lowest = min(rows, key=lambda row: row.cosine)
    caption = f"Cosine of each layer at the end; lowest {lowest.name} with {number(lowest.cosine, 4)}"
    bars = bar_chart(caption, [(row.name, float(row.cosine), number(row.cosine, 4)) for row in rows])
    return _figure("Cosine by layer at the end", bars, f"{caption}. Bars start at 1: the shorter, the better aligned.")


def steps(data: RunData) -> Markup:
    """Return step size and mask flips of each layer as word-sized curves."""
    title = "Step sizes and mask flips"
    _, epochs = _compressed_epochs(data)
    step, flips = _series(epochs, "step"), _series(epochs, "flip_rate")
    if not step and not flips:
        return section("steps", title, absent("No curves: this run has no compressed epochs yet."))
    highest = max([value for values in flips.values() for value in values if drawable(value)], default=1.0)
    rows = [
        [
            code(name),
            figure_cell(significant(_first(step.get(name)))),
            _spark_cell(f"step size of {name}", step.get(name, []), None),
            figure_cell(significant(_last(step.get(name)))),
            _spark_cell(f"mask flips of {name}", flips.get(name, []), highest or 1.0),
            figure_cell(percent(_last(flips.get(name)))),
        ]
        for name in dict.fromkeys([*step, *flips])
    ]
    head = ["Layer", column("Step, first"), "over epochs", column("last"), "Mask flips over epochs", column("last")]
    note = (
        "Step: the learned quantizer step (mean where there is one per channel), each curve on its own scale. Mask "
        "flips: share of weights whose place in the pattern changed during the epoch, all curves on one scale; it "
        "should fall towards zero."
    )
    grid = table("Step size and mask flips of each layer over the compressed epochs", head, rows, sticky=True)
    folded = details(f"Curves of {plural(len(rows), 'layer')}", grid, expanded=len(rows) <= MANY_LAYERS)
    return section("steps", title, sentences([note]), folded)


def _spark_cell(caption: str, values: Sequence[Any], high: float | None) -> Cell:
    """A sparkline on its own scale, or from zero to `high`."""
    found = [float(value) for value in values if drawable(value)]
    if not found:
        return cell("–")
    low, top = (min(found), max(found)) if high is None else (0.0, high)
    return cell(sparkline(f"{caption}: from {significant(found[0])} to {significant(found[-1])}", values, low, top))


def _compressed_epochs(data: RunData) -> tuple[int, Epochs]:
    """Return the epochs that have per-layer values, and the number of the first one in the whole run."""
    epochs: Epochs = (data.metrics or {}).get("epochs") or []
    found = [(index, epoch) for index, epoch in enumerate(epochs, 1) if epoch.get("layers")]
    return (found[0][0] if found else 1), [epoch for _, epoch in found]


def _series(epochs: Epochs, key: str) -> dict[str, list[Any]]:
    """Return layer -> its value of `key` per epoch, for layers which ever had a drawable one."""
    names = dict.fromkeys(name for epoch in epochs for name in epoch["layers"])
    series = {name: [epoch["layers"].get(name, {}).get(key) for epoch in epochs] for name in names}
    return {name: values for name, values in series.items() if any(drawable(value) for value in values)}


def _first(values: Sequence[Any] | None) -> Any:
    return values[0] if values else None


def _last(values: Sequence[Any] | None) -> Any:
    return values[-1] if values else None


def _figure(title: str, chart: Markup, caption: str) -> Markup:
    return tag("figure", tag("h3", title), chart, tag("figcaption", f"{caption.rstrip('.')}."))
