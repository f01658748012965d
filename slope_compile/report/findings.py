"""What a reader must not miss: checks that failed, with the layer where it begins, and checks that were not made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slope_compile.report.data import RunData
from slope_compile.report.figures import real, significant
from slope_compile.report.markup import Content, Markup, join, tag
from slope_compile.report.tables import (
    absent,
    check_name,
    code,
    column,
    figure_cell,
    section,
    status,
    table,
    value_text,
    wide_cell,
)

OPEN = "not checked"


def failed_checks(data: RunData) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the failed checks with their targets."""
    return [(target, check) for target, check in _checks(data) if check["status"] == "fail"]


def failures(data: RunData) -> Markup | None:
    """Return what failed, as far down as the verification could follow it; None if nothing failed."""
    found = failed_checks(data)
    return section("failed", "What failed", *(_failure(*row) for row in found)) if found else None


def headline(check: Mapping[str, Any]) -> str:
    """Return what a check found; where the layer is told apart, without the part of the line that says it too."""
    detail = str(check["detail"] or "–")
    found = isinstance((check.get("figures") or {}).get("diverges"), Mapping)
    return detail.partition("; first differs ")[0] if found else detail


def _failure(target: str, check: Mapping[str, Any]) -> Markup:
    diverges = (check.get("figures") or {}).get("diverges")
    heading = join([status("fail"), " ", code(str(check["name"])), f" for {target}"])
    body = (
        _divergence(target, diverges)
        if isinstance(diverges, Mapping)
        else [tag("p", "The verification did not name a layer where it begins.", class_="note")]
        if str(check["name"]).startswith("parity.")
        else []
    )
    return tag("article", tag("h3", heading), tag("p", headline(check)), *body, class_="failure")


def _divergence(target: str, found: Mapping[str, Any]) -> list[Content]:
    layer = join([code(str(found.get("layer") or "not named")), _operator(found.get("operator"))])
    facts: list[tuple[str, Content]] = [("First layer that differs", layer)]
    error, allowed = real(found.get("error")), real(found.get("allowed"))
    if error is not None:
        limit = "" if allowed is None else f", allowed {significant(allowed, 2)}"
        facts.append(("Its error", f"{significant(error, 2)} of the largest value{limit}"))
    facts.append(("Likely cause", str(found.get("cause") or "not recognized")))
    parts: list[Content] = [tag("dl", *(tag("div", tag("dt", name), tag("dd", text)) for name, text in facts))]
    reference, tested = found.get("reference"), found.get("tested")
    if isinstance(reference, Mapping) and isinstance(tested, Mapping):
        parts.append(_statistics(reference, tested))
    if found.get("command"):
        folder = code(f"verify/{target}/{found['reproducer']}") if found.get("reproducer") else "its folder"
        parts.append(tag("p", "The layer alone, with its inputs, replays in ", folder, " with:", class_="note"))
        parts.append(tag("pre", tag("code", str(found["command"])), tabindex=0))
    return parts


def _operator(name: Any) -> str | None:
    return f" ({name})" if name else None


def _statistics(reference: Mapping[str, Any], tested: Mapping[str, Any]) -> Markup:
    rows = [
        [key.replace("_", " "), figure_cell(value_text(reference.get(key))), figure_cell(value_text(tested.get(key)))]
        for key in dict.fromkeys([*reference, *tested])
    ]
    head: list[Content] = ["Statistic", column("Reference"), column("Tested")]
    return table("The layer's output on either side", head, rows)


def unchecked(data: RunData) -> Markup:
    """Return every check that was not made, with the reason; the same one of several targets stands once."""
    title = "What was not checked"
    if not data.verdicts:
        return section("unchecked", title, absent("Nothing was checked: no stage of this run verified its artifacts."))
    found: dict[tuple[str, str], list[str]] = {}
    for target, name, why in _open(data):
        found.setdefault((name, why), []).append(target)
    if not found:
        return section("unchecked", title, tag("p", "Everything was checked: no check is open."))
    rows = [[check_name(name), ", ".join(targets), wide_cell(why)] for (name, why), targets in found.items()]
    note = tag("p", "None of these counts as a pass.", class_="note")
    grid = table("Checks that were not made, and why", ["Check", "Target", "Why"], rows)
    return section("unchecked", title, note, grid)


def _open(data: RunData) -> Iterator[tuple[str, str, str]]:
    """Yield (target, what, why): checks, then what the build could not read from the engine."""
    for target, check in _checks(data):
        if check["status"] == OPEN:
            yield target, str(check["name"]), check["detail"] or "no reason was given"
    for target, build in data.builds.items():
        sparse: Mapping[str, Any] = build["summary"].get("sparse") or {}
        for key, what in (("eligible_by", "sparse kernels, eligible"), ("chosen_by", "sparse kernels, chosen")):
            told = str(sparse.get(key) or "")
            if told.startswith(OPEN):
                yield target, what, told.removeprefix(OPEN).lstrip(": ") or "no reason was given"
        if build["summary"]["held"] is None:
            yield target, "layers of the engine", "the engine could not be read"


def _checks(data: RunData) -> list[tuple[str, Mapping[str, Any]]]:
    return [(target, check) for target, verdict in data.verdicts.items() for check in verdict["checks"]]
