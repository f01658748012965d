"""`--require metric`: checks that must pass. `not checked`, which is no failure by itself, then is one; so is absence.

A name with further ones below it stands for all of them: `parity`, or `parity.*`, for every parity check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from slope_compile.errors import RecipeError, nearest

# Every check that some verification makes, in order; the last two groups: of bundles, and with --baseline.
CHECKS = (
    "digest",
    "pattern",
    "codes",
    "packed",
    "repeatable",
    "parity.folded",
    "parity.onnx",
    "parity.onnx-default",
    "parity.placed",
    "parity.engine",
    "engine.layers",
    "agreement",
    "metric",
    "placement",
    "baseline.size",
    "baseline.metric",
    "baseline.latency",
    "baseline.sparse",
    "baseline.layers",
)
JUDGED_AGAINST, FP32 = "judged_against", "FP32"  # figure of `metric`: without FP32 half of it was not made
FAMILIES = tuple(dict.fromkeys(name.partition(".")[0] for name in CHECKS if "." in name))


def parse_required(names: Iterable[str]) -> tuple[str, ...]:
    """Return the checks that names stand for, each once, in the order of the names.

    Args:
        names: Of checks, or of families: `metric`, `parity.engine`, `parity`, `parity.*`.

    Raises:
        RecipeError: If there is no such check.
    """
    found: list[str] = []
    for name in names:
        family = name.removesuffix(".*")
        if name in CHECKS:
            found.append(name)
        elif family in FAMILIES:
            found += [check for check in CHECKS if check.startswith(f"{family}.")]
        else:
            raise RecipeError(f"The requirement '{name}' names no check.", nearest(name, (*CHECKS, *FAMILIES)))
    return tuple(dict.fromkeys(found))


def judge_required(required: Sequence[str], checks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what became of every required check: `name`, `status`, `met` and `detail`.

    Args:
        required: Names of checks.
        checks: Those that were made, in verify.json's form.
    """
    made = {check["name"]: check for check in checks}
    return [_judge(name, made.get(name)) for name in required]


def _judge(name: str, check: Mapping[str, Any] | None) -> dict[str, Any]:
    if check is None:
        why = "it needs --baseline" if name.startswith("baseline.") else "this artifact has none of that name"
        return {"name": name, "status": "absent", "met": False, "detail": why}
    if check["status"] == "pass" and FP32 not in check.get("figures", {}).get(JUDGED_AGAINST, (FP32,)):
        return {"name": name, "status": "not checked", "met": False, "detail": check["detail"]}  # its drop from FP32
    return {"name": name, "status": check["status"], "met": check["status"] == "pass", "detail": check["detail"]}
