"""The verdict as Markdown, for a job's summary: what failed and why first, then every check."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from slope_compile.verify.ci.verified import Verified, plain

MARKS = {"pass": "✅ pass", "fail": "❌ fail", "not checked": "⚪ not checked"}
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")


def markdown(verified: Verified) -> str:
    """Return the summary."""
    verdict = verified.verdict["verdict"]
    lines = [f"## slope-compile verify: {verdict}", "", f"`{_code(verified.location)}`", ""]
    if findings := verified.findings():
        lines += ["### Why it fails", ""]
        lines += [f"- **{_text(finding.title)}**: {_text(finding.detail)}" for finding in findings]
        lines.append("")
    for check in verified.checks:
        lines += _divergence(check, verified.results_of(check.get("target")))
    lines += ["### Checks", "", "| check | target | status | detail |", "|---|---|---|---|"]
    lines += [_row(check) for check in verified.checks]
    if verified.required:
        lines += ["", "### Required", "", "| check | target | status | met |", "|---|---|---|---|"]
        lines += [_required(row) for row in verified.required]
    return "\n".join(lines) + "\n"


def _row(check: Mapping[str, Any]) -> str:
    cells = (_text(check["name"]), _text(check.get("target") or "–"), MARKS[check["status"]], _text(check["detail"]))
    return f"| {' | '.join(cells)} |"


def _required(row: Mapping[str, Any]) -> str:
    cells = (_text(row["name"]), _text(row.get("target") or "–"), _text(row["status"]), "yes" if row["met"] else "no")
    return f"| {' | '.join(cells)} |"


def _divergence(check: Mapping[str, Any], results: str) -> Sequence[str]:
    """Return the first layer that differs, where the check found one."""
    found = check["figures"].get("diverges")
    if not found:
        return []
    where = f"`{_code(found['layer'])}` ({_text(found['operator'])})" if found.get("layer") else "no layer by itself"
    lines = [f"### {_text(check['name'])}: first differs at {where}", "", f"Likely cause: {_text(found['cause'])}", ""]
    figures = list(dict.fromkeys([*found["reference"], *found["tested"]]))
    lines += ["| | " + " | ".join(map(_text, figures)) + " |", "|---" * (len(figures) + 1) + "|"]
    for side in ("reference", "tested"):
        told = [_text(found[side].get(name, "–")) for name in figures]
        lines.append(f"| {side} | {' | '.join(told)} |")
    if found.get("command"):
        lines += ["", f"Replay it in `{_code(results + found['reproducer'])}`: `{_code(found['command'])}`"]
    return [*lines, ""]


def _text(value: object) -> str:
    """Return text that Markdown shows as it is: no markup, no HTML, no cell's end."""
    return _SPECIAL.sub(r"\\\1", plain(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _code(value: object) -> str:
    """Return text for between two backticks."""
    return plain(value).replace("`", "'").replace("|", "\u2502")
