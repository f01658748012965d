"""SARIF 2.1.0: each reason for the verdict `fail` is a result; what was not checked is a note of the invocation.

GitHub shows every result as an alert, whatever its `kind` says; so passes are no results, and neither is what this
machine could not check. The standard has a place for the latter: `toolExecutionNotifications`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from slope_compile._version import __version__
from slope_compile.verify.ci.verified import Finding, Verified

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
RULES = {
    "digest": "The files are those that the manifest lists.",
    "pattern": "Weights keep the n:m pattern, the code range, positive scales and zero points of 0.",
    "codes": "Codes and scales are those that were trained, bit for bit.",
    "packed": "The packed file holds what was trained, bit for bit.",
    "repeatable": "The same input gives the same output, alone or in a batch.",
    "parity.folded": "The folded torch model answers as the trained one.",
    "parity.onnx": "The ONNX file answers as the torch model.",
    "parity.onnx-default": "ONNX Runtime with its default optimizations answers as without any.",
    "parity.placed": "The model placed for the engine has the same weights and answers the same.",
    "parity.engine": "The engine answers as ONNX Runtime.",
    "engine.layers": "The engine holds each compressed layer as it was placed.",
    "agreement": "What is deployed agrees with what was trained, from end to end.",
    "metric": "The task's metric stays within the budget.",
    "placement": "The placed model's weights are where the bundle puts them.",
    "baseline.size": "The files are no bigger than the baseline's, beyond the budget.",
    "baseline.metric": "The metric is no worse than the baseline's, beyond the budget.",
    "baseline.latency": "The engine is no slower than the baseline's, beyond the budget.",
    "baseline.sparse": "No layer lost the sparse kernel that it had in the baseline, beyond the budget.",
    "baseline.layers": "No layer lost the compression that it had in the baseline.",
    "verdict": "Some check could be made.",
}


def sarif(verified: Verified) -> bytes:
    """Return the verdict as SARIF."""
    index = {name: number for number, name in enumerate(RULES)}
    driver = {"name": "slope-compile", "version": __version__, "rules": [_rule(name) for name in RULES]}
    notes = [_note(check) for check in verified.checks if check["status"] == "not checked"]
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"slope-compile/verify/{verified.name}/"},
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "results": [_result(finding, index) for finding in verified.findings()],
    }
    text = json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1, allow_nan=False)
    return text.encode() + b"\n"


def uri(path: str) -> str:
    """Return a path as SARIF has it: a relative reference, or a file: URI, percent-encoded."""
    quoted = quote(path)
    return f"file://{quoted}" if PurePosixPath(path).is_absolute() else quoted


def fingerprint(finding: Finding) -> str:
    """Return what stays the same while the same thing is wrong with the same file."""
    return hashlib.sha256("\0".join((finding.check, finding.target or "", finding.file)).encode()).hexdigest()


def _rule(name: str) -> dict[str, Any]:
    return {
        "id": name,
        "shortDescription": {"text": RULES[name]},
        "defaultConfiguration": {"level": "error"},
    }


def _result(finding: Finding, index: Mapping[str, int]) -> dict[str, Any]:
    where = {"artifactLocation": {"uri": uri(finding.file)}, "region": {"startLine": 1}}
    return {
        "ruleId": finding.check,
        "ruleIndex": index[finding.check],
        "kind": "fail",
        "level": "error",
        "message": {"text": f"{finding.title}: {finding.detail}"},
        "locations": [{"physicalLocation": where}],
        "partialFingerprints": {"slopeCompileVerify/v1": fingerprint(finding)},
    }


def _note(check: Mapping[str, Any]) -> dict[str, Any]:
    target = f" ({check['target']})" if check.get("target") else ""
    text = f"{check['name']}{target} not checked: {check['detail']}"
    return {"level": "note", "message": {"text": text}, "associatedRule": {"id": check["name"]}}
