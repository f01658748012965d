"""What follows the table of checks: where a failure begins, what was required in vain, and the verdict in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slope_compile_cli.console import Console

Results = Callable[[str | None], Path]  # target -> folder of its verification


def tell_verdict(console: Console, verdict: Mapping[str, Any], results: Results) -> None:
    """Print the table of checks and, of those that failed, the layer, both tensors, the likely cause and the replay.

    Args:
        console: Where to print.
        verdict: verify.json's form; of several targets each row with its `target`.
        results: Where the files of a target's verification are.
    """
    console.checks(verdict)
    failed = [check for check in verdict["checks"] if check["status"] == "fail"]
    for check in failed:
        if found := check["figures"].get("diverges"):
            _tell_divergence(console, _named(check), found, results(check.get("target")))
    unmet = [row for row in verdict["required"] if not row["met"]]
    for row in unmet:
        console.say(f"required: {_named(row)} is {row['status']}: {row['detail']}")
    reasons = [*map(_named, failed), *(f"{_named(row)} required" for row in unmet if row["status"] != "fail")]
    why = f" ({', '.join(reasons)})" if reasons else ""
    console.say(f"verdict: {verdict['verdict']}{why}")


def _tell_divergence(console: Console, name: str, found: Mapping[str, Any], results: Path) -> None:
    where = f"{found['layer']} ({found['operator']})" if found.get("layer") else "no layer by itself"
    console.say(f"{name}: first differs at {where}; likely cause: {found['cause']}")
    sides = {"reference": found["reference"], "found": found["tested"]}
    columns = list(dict.fromkeys(key for side in sides.values() for key in side))
    if columns:
        rows = [(side, *(values.get(key) for key in columns)) for side, values in sides.items()]
        console.table("the layer's output", ("", *columns), rows)
    if found.get("command"):
        console.say(f"replay it: cd {results / found['reproducer']} && {found['command']}")


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['name']} ({row['target']})" if row.get("target") else str(row["name"])
