"""The task metric: of the FP32 model, the compressed one and the ONNX file, with the interval it is known within."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slope_compile.metric_names import title, words
from slope_compile.report.data import RunData
from slope_compile.report.figures import SAME_LINE, number, percent, real
from slope_compile.report.intervals import Dot, Rule, interval_chart
from slope_compile.report.markup import Content, Markup, tag
from slope_compile.report.tables import absent, column, figure_cell, section, sentences, status, table

CONFIDENCE = f"(95{SAME_LINE}%)"
MODELS = {"fp32": "FP32 model", "compressed": "Compressed model (PyTorch)", "onnx": "ONNX file (ONNX Runtime)"}
# Whose metric the file's is compared with -> the end of the figures' names.
REFERENCES = {"FP32": "", "compressed": "_from_compressed"}
SHORT = {"fp32": "FP32", "compressed": "compressed", "onnx": "ONNX file"}


@dataclass(frozen=True)
class Drop:
    """How far the ONNX file's metric is below another model's.

    Args:
        whose: The other model.
        value: The relative drop.
        within: Its 95 % interval.
    """

    whose: str
    value: float
    within: tuple[float, float]

    def open(self, budget: float) -> bool:
        """Whether the interval reaches to both sides of the budget."""
        return self.within[0] <= budget < self.within[1]


@dataclass(frozen=True)
class Interval:
    """What the `metric` check measured of one metric; None is what it did not say.

    Args:
        around: The 95 % interval of the ONNX file's metric.
        drops: The drops of which it measured an interval.
        budget: The largest drop that passes.
        certain: Whether other items of the kind would give the same verdict.
        items: Validation items.
        reason: Why an interval is missing, as the check says it.
    """

    around: tuple[float, float] | None
    drops: Sequence[Drop]
    budget: float | None
    certain: bool | None
    items: int | None
    reason: str | None


def metric_heading(data: RunData) -> str:
    """Return the title of the part about the task metric."""
    return "Accuracy" if data.metric == "accuracy" else "Mean average precision"


def accuracy(data: RunData) -> Markup:
    """Return the task's metrics of the FP32 model, the compressed model and the ONNX file, and how sure they are."""
    heading = metric_heading(data)
    if not any(value is not None for value in data.accuracies.values()):
        return section("accuracy", heading, absent("Nothing was measured: this run has not been trained."))
    allowed = data.setting("verify", "metric_drop")
    note = (
        f"Measured on the validation images. The verdict allows a relative drop of {percent(allowed, 1)} against FP32."
    )
    parts = [_metric(data, metric, values) for metric, values in _metrics(data).items()]
    return section("accuracy", heading, sentences([note]), *parts)


def _metrics(data: RunData) -> dict[str, Mapping[str, float | None]]:
    return {data.metric: data.accuracies, **data.other_metrics}


def _metric(data: RunData, metric: str, values: Mapping[str, float | None]) -> Markup:
    found = _interval(data, metric)
    charts = [chart for chart in (_value_chart(metric, values, found), _drop_chart(metric, found)) if chart]
    return tag(
        "div",
        _certainty(metric, found),
        tag("div", *charts, class_="charts") if charts else None,
        _metric_table(data, metric, values, found),
    )


def _interval(data: RunData, metric: str) -> Interval | None:
    """Return what the first target's metric check with figures says of a metric, None if none has any."""
    for verdict in data.verdicts.values():
        checks = (check for check in verdict["checks"] if check["name"] == "metric")
        outside: Mapping[str, Any] = next(checks, {"figures": {}}).get("figures") or {}
        own = outside if metric == data.metric else outside.get(metric)  # the primary metric's figures stand outside
        if not isinstance(own, Mapping) or real(own.get("onnx")) is None:
            continue
        reason = own.get("interval_reason") or outside.get("interval_reason")
        return Interval(
            _pair(own.get("accuracy_interval")),
            [drop for whose, key in REFERENCES.items() if (drop := _drop(whose, own, key))],
            real(outside.get("budget")),
            own["certain"] if isinstance(own.get("certain"), bool) else None,
            outside["items"] if isinstance(outside.get("items"), int) else None,
            str(reason) if reason else None,
        )
    return None


def _drop(whose: str, figures: Mapping[str, Any], suffix: str) -> Drop | None:
    value, within = real(figures.get(f"drop{suffix}")), _pair(figures.get(f"interval{suffix}"))
    return None if value is None or within is None else Drop(whose, value, within)


def _pair(value: Any) -> tuple[float, float] | None:
    """Return [low, high] as numbers; a number that is not finite bounds nothing and is drawn nowhere."""
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return None
    low, high = (real(end) for end in value)
    return None if low is None or high is None or not low <= high else (low, high)


def _certainty(metric: str, found: Interval | None) -> Markup:
    """Say in words what the interval means for the verdict."""
    name = words(metric)
    if found is None:
        return absent(f"The ONNX file's {name} was not measured: no check of the metric ran.")
    if not found.drops:
        told = found.reason or "the verification kept none"
        return absent(f"How sure this is cannot be said: there is no interval ({told}).")
    items = f" over {found.items} items" if found.items else ""
    drops = " and ".join(
        f"by {percent(drop.value)} against the {drop.whose} model ({_span(drop)})" for drop in found.drops
    )
    text = f"The ONNX file's {name} drops {drops}: 95{SAME_LINE}% intervals{items}, below zero it gains."
    if found.certain is None or found.budget is None:
        return tag("p", text)
    return tag("p", text, " ", *_certain(found.drops, found.budget, found.certain))


def _certain(drops: Sequence[Drop], budget: float, certain: bool) -> tuple[Content, str]:
    """Return the sign and what it means, from the intervals that were drawn."""
    allowed, unsure = percent(budget, 1), [drop for drop in drops if drop.open(budget)]
    if certain and any(drop.value > budget for drop in drops):
        return status("fail"), f" for certain: a whole interval is beyond the {allowed} allowed."
    if certain:
        return status("pass"), f" for certain: the intervals are within the {allowed} allowed."
    if not unsure:
        return status("cannot tell"), ", as one of the two has no interval."
    whose = " and from the ".join(drop.whose for drop in unsure)
    return (
        status("cannot tell"),
        f" whether the drop from the {whose} model is within {allowed}: its interval reaches to both sides of that. "
        "The verdict goes by the measured drop; more validation items would narrow the interval.",
    )


def _span(drop: Drop) -> str:
    return f"{percent(drop.within[0])} to {percent(drop.within[1])}"


def _value_chart(metric: str, values: Mapping[str, float | None], found: Interval | None) -> Markup | None:
    fp32 = values.get("fp32")
    dots = [
        Dot(SHORT[key], value, percent(value), found.around if found and key == "onnx" else None)
        for key in SHORT
        if (value := values.get(key)) is not None
    ]
    rules = [Rule("FP32", fp32)] if fp32 is not None else []
    if fp32 is not None and found and found.budget is not None:
        rules.append(Rule("least allowed", fp32 * (1 - found.budget), dashed=True))
    heading = title(metric)
    around = found.around if found else None
    told = f"; ONNX file within {percent(around[0])} and {percent(around[1])} {CONFIDENCE}" if around else ""
    caption = f"{heading}: {', '.join(f'{dot.name} {dot.text}' for dot in dots)}{told}"
    return _figure(f"{heading} on the validation images", interval_chart(caption, dots, rules), caption)


def _drop_chart(metric: str, found: Interval | None) -> Markup | None:
    if found is None or not found.drops:
        return None
    rules = [Rule("no drop", 0.0)]
    if found.budget is not None:
        rules.append(Rule("budget", found.budget, dashed=True))
    dots = [Dot(f"from {drop.whose}", drop.value, percent(drop.value), drop.within) for drop in found.drops]
    told = ", ".join(f"{dot.name} {dot.text} ({_span(drop)})" for dot, drop in zip(dots, found.drops, strict=True))
    caption = f"Relative drop of {words(metric)}: {told}, 95{SAME_LINE}% intervals"
    if found.budget is not None:
        caption += f"; at most {percent(found.budget, 1)} is allowed"
    return _figure("Drop of the ONNX file, against its budget", interval_chart(caption, dots, rules), caption)


def _figure(heading: str, chart: Markup | None, caption: str) -> Markup | None:
    return chart and tag("figure", tag("h3", heading), chart, tag("figcaption", f"{caption}."))


def _metric_table(data: RunData, metric: str, values: Mapping[str, float | None], found: Interval | None) -> Markup:
    losses = {name: (data.metrics or {}).get(name, {}).get("loss") for name in ("fp32", "compressed")}
    has_loss = any(loss is not None for loss in losses.values())
    around = found.around if found else None
    rows: list[Sequence[Content]] = []
    for key, name in MODELS.items():
        row = [name, *_values(values.get(key), values.get("fp32") if key != "fp32" else None)]
        if around is not None:
            row.append(figure_cell(f"{percent(around[0])} to {percent(around[1])}" if key == "onnx" else "–"))
        rows.append([*row, figure_cell(number(losses.get(key), 4))] if has_loss else row)
    head: list[Content] = ["Model", column(title(metric)), column("Against FP32")]
    head += [column("95 % interval")] if around is not None else []
    head += [column("Loss")] if has_loss else []
    return table(f"{title(metric)} on the validation images", head, rows)


def _values(value: float | None, fp32: float | None) -> list[Content]:
    change = "–" if value is None or fp32 is None else f"{number((value - fp32) * 100, 2)} points"
    return [figure_cell(percent(value) if value is not None else "not measured"), figure_cell(change)]
