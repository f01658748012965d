"""Runs whose names are no names: markup, right-to-left marks, great lengths, in every place that the chain shows."""

from __future__ import annotations

import json
from typing import Any

from report_runs import FAILED, LAYERS, layer_errors, make_run

from slope_compile.report.page import RunData

MARKUP = "<script>alert(1)</script>\"'&]]>--></style></title>"
TURNED = "\u202etxt.exe\u2066\u05d0\u05d1\u05d2 \u0627\u0644"  # right-to-left override, isolate, Hebrew, Arabic
LONG = "a_name_that_nobody_can_read_" * 20
NAMES = (MARKUP, TURNED, LONG, "\U0001f600" * 40, "w i d e  " * 30)


def hostile_run(text: str) -> RunData:
    """A failed run in which layers, targets, stages, causes and commands are `text`."""
    names = [f"{text}{name}" for name, *_ in LAYERS]
    failed = json.loads(json.dumps(FAILED))
    for check in failed["checks"]:
        check["detail"] = text
        figures = check["figures"]
        if "from" in figures:
            figures |= {"from": f"{text}{figures['from']}", "to": f"{text}{figures['to']}", "relative": "nan"}
        if "diverges" in figures:
            figures["diverges"] = {key: _texts(value, text) for key, value in figures["diverges"].items()}
    errors = layer_errors(names)
    for hop in errors["hops"]:
        hop |= {"from": text, "to": text}
    for row in errors["layers"]:
        row["operator"] = text
        row["errors"]["parity.onnx"] = {"relative": "inf", "allowed": "-inf"}
    run = make_run()
    metrics, layers = json.loads(json.dumps([run.metrics, run.layers]))
    for index, (plan, row) in enumerate(zip(metrics["plan"], layers["layers"], strict=True)):
        plan["name"], row["name"] = names[index], f"{names[index]}.weight"
    return make_run(
        name=text,
        metrics=metrics,
        layers=layers,
        builds={},
        verdicts={text: failed},
        layer_errors={text: errors},
    )


def _texts(value: Any, text: str) -> Any:
    return {f"{text}{key}": text for key in value} if isinstance(value, dict) else text
