"""Lints an ONNX file for a situation: every rule, every place that breaks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slope_compile.lint import (  # noqa: F401  each fills the registry
    blocks,
    data,
    dtypes,
    opsets,
    order,
    placement_of_qdq,
    scales,
    sparsity,
    structure,
    weights,
)
from slope_compile.lint.rules import RULES, Violation
from slope_compile.lint.view import View
from slope_compile.placement.situation import Situation
from slope_compile.qdq.tensors import load_model


def lint(onnx: Path, situation: Situation) -> list[Violation]:
    """Return what an ONNX file breaks of the rules, errors first, then in the rules' order and in graph order.

    Args:
        onnx: An ONNX file, of slope-compile or of any other tool.
        situation: Target, backend, version and precision that it is judged for.

    Raises:
        ArtifactError: If the file is missing, no ONNX model, or its graph cannot be followed.
    """
    view = View(load_model(onnx), onnx.parent, situation)
    with np.errstate(all="ignore"):  # a file may hold NaN and infinity: that is for the rules to say
        found = [rule.violation(hit) for rule in RULES.values() for hit in rule.check(view)]
    return sorted(found, key=lambda violation: violation.level)
