"""The parts of the page that say how it went: verdict, key figures, pipeline, checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slope_compile.metric_names import title
from slope_compile.report.data import RunData
from slope_compile.report.figures import is_number, number, percent, plural, ratio, size
from slope_compile.report.findings import headline
from slope_compile.report.layers import layer_rows
from slope_compile.report.markup import Markup, join, tag
from slope_compile.report.sizes import sizes
from slope_compile.report.tables import (
    absent,
    check_name,
    section,
    sentences,
    status,
    table,
    value_text,
    wide_cell,
)


def verdict_banner(data: RunData) -> Markup:
    """Return the verdict over all targets in words, the failed checks named."""
    checks = [(target, check) for target, verdict in data.verdicts.items() for check in verdict["checks"]]
    if not data.verdicts:
        heading, style, text = "○ Not verified", "open", "No stage of this run has checked its artifacts yet."
    else:
        passed = all(verdict["verdict"] == "pass" for verdict in data.verdicts.values())
        heading, style = ("✓ Verdict: pass", "pass") if passed else ("✗ Verdict: FAIL", "fail")
        counts = [f"{_count(checks, name)} {word}" for name, word in (("pass", "passed"), ("fail", "failed"))]
        counts.append(f"{_count(checks, 'not checked')} not checked on this machine")
        text = f"{', '.join(data.verdicts)}: {', '.join(counts)}."
    failed = [
        tag("li", f"{target}: {check['name']}. {headline(check)}")
        for target, check in checks
        if check["status"] == "fail"
    ]
    return tag(
        "div",
        tag("h2", heading, class_=f"status {style}"),
        tag("p", text),
        tag("ul", *failed) if failed else None,
        class_=f"verdict {style}",
    )


def tiles(data: RunData) -> Markup | None:
    """Return the run's key figures, those that exist; None if there are none."""
    found = [
        tag("div", tag("dt", title), tag("dd", value), tag("dd", detail, class_="detail"))
        for title, value, detail in _tiles(data)
    ]
    return tag("dl", *found, class_="tiles") if found else None


def _tiles(data: RunData) -> Iterator[tuple[str, str, str]]:
    fp32, compressed = data.accuracies.get("fp32"), data.accuracies.get("compressed")
    if compressed is not None:
        yield f"{title(data.metric)}, compressed", percent(compressed), f"FP32 {percent(fp32)}"
    for row in data.sizes:
        if row.stage in ("pack", "export") or row.stage.startswith("build"):
            target = row.stage.partition("/")[2]
            what = f"{row.what}, {target}" if target else row.what
            yield what, size(row.bytes), f"{ratio(row.bytes, data.fp32_bytes)} than FP32" if data.fp32_bytes else ""
    sparse = [row for row in layer_rows(data) if row.bits is not None]
    counted = [row for row in sparse if is_number(row.density)]
    if counted:
        elements = sum(row.elements for row in counted)
        density = sum(row.elements * row.density for row in counted) / elements
        yield "Nonzero weights", percent(density, 1), f"of {plural(len(counted), 'coded layer')}"
    cosines = [row.cosine for row in sparse if is_number(row.cosine)]
    if cosines:
        yield (
            "Mean cosine to latent",
            number(sum(cosines) / len(cosines), 4),
            f"over {plural(len(cosines), 'coded layer')}",
        )


def pipeline(data: RunData) -> Markup:
    """Return the four stages with what each did, and the sizes along the way."""
    cards = [_train_card(data), _export_card(data), _build_card(data), _verify_card(data)]
    return section("pipeline", "Pipeline and sizes", tag("ol", *cards, class_="pipeline"), sizes(data))


def _card(stage: str, lines: list[Any]) -> Markup:
    done = bool(lines)
    return tag(
        "li",
        tag("h3", stage),
        *(tag("p", line) for line in (lines or ["not run"])),
        class_=None if done else "todo",
    )


def _train_card(data: RunData) -> Markup:
    if data.metrics is None:
        return _card("train", [])
    phases = [epoch["phase"] for epoch in data.metrics["epochs"]]
    counts = [f"{plural(phases.count(phase), phase.upper() + ' epoch')}" for phase in dict.fromkeys(phases)]
    items = data.metrics.get("data") or {}
    images = f"{items.get('train', '–')} training, {items.get('validation', '–')} validation images"
    return _card("train", [", ".join(counts), images])


def _export_card(data: RunData) -> Markup:
    if data.layers is None:
        return _card("export", [])
    placements: dict[str, int] = {}
    for row in data.layers["layers"]:
        placements[row["placement"]] = placements.get(row["placement"], 0) + 1
    return _card(
        "export",
        [f"ONNX opset {data.setting('export', 'opset')}", *(f"{count} × {name}" for name, count in placements.items())],
    )


def _build_card(data: RunData) -> Markup:
    lines = []
    for target, build in data.builds.items():
        header, summary = build["header"], build["summary"]
        lines += [
            f"{target}: {header['backend']} {header['version']}, SM {header['sm']}",
            _held(summary),
            summary.get("line", "counted by another version of slope-compile: build it again"),
        ]
    return _card("build", lines)


def _held(summary: Mapping[str, Any]) -> str:
    if summary["held"] is None:
        return f"{plural(summary['coded'], 'coded layer')}: not checked whether held as declared"
    return f"{summary['held']} of {plural(summary['coded'], 'coded layer')} held as declared"


def _verify_card(data: RunData) -> Markup:
    return _card(
        "verify", [join([f"{target}: ", status(verdict["verdict"])]) for target, verdict in data.verdicts.items()]
    )


def checks(data: RunData) -> Markup:
    """Return every check of every target; `not checked` stands with its reason."""
    if not data.verdicts:
        return section("checks", "Checks", absent("Nothing was verified."))
    tables = [
        table(
            f"Checks of the verdict for {target}: {verdict['verdict']}",
            ["Check", "Status", "Detail", "Figures"],
            [
                [
                    check_name(check["name"]),
                    status(check["status"]),
                    wide_cell(check["detail"] or "–"),
                    wide_cell(_figures(check.get("figures") or {})),
                ]
                for check in verdict["checks"]
            ],
        )
        for target, verdict in data.verdicts.items()
    ]
    note = "A check that this machine cannot make is listed as not checked, with the reason; it never counts as a pass."
    return section("checks", "Checks", sentences([note]), *tables)


def _figures(figures: Mapping[str, Any]) -> Markup:
    lines = [
        tag("span", f"{key.replace('_', ' ')}: {value_text(value)}", class_="sub") for key, value in figures.items()
    ]
    return join(lines or ["–"])


def _count(checks: list[tuple[str, Any]], name: str) -> int:
    return sum(check["status"] == name for _, check in checks)
