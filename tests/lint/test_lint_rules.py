"""Every rule: a minimal graph that breaks it, and its twin that does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_cases import BROKEN, Make
from lint_graphs import activation, conv, int4, model, pair, situation, skip, sparse, tensor
from onnx import TensorProto, helper
from qdq_graphs import node

from slope_compile.lint.check import lint
from slope_compile.lint.rules import RULES, Violation


def found(tmp_path: Path, graph: onnx.ModelProto, **of_situation: str) -> list[Violation]:
    path = tmp_path / "m.onnx"
    onnx.save(graph, path)
    return lint(path, situation(**of_situation))


@pytest.mark.parametrize(
    ("rule", "level", "detail", "bad", "good"), BROKEN, ids=[f"{b[0]}-{i}" for i, b in enumerate(BROKEN)]
)
def test_rule(tmp_path: Path, rule: str, level: str, detail: str, bad: Make, good: Make) -> None:
    hits = [v for v in found(tmp_path, bad()) if v.rule == rule]
    assert [v for v in hits if v.level == level and detail in v.detail], hits or found(tmp_path, bad())
    assert all(v.where and v.remedy and v.source for v in hits)
    assert [v for v in found(tmp_path, good()) if v.rule == rule] == []


def test_every_rule_is_broken_above() -> None:
    assert {broken[0] for broken in BROKEN} == set(RULES)


@pytest.mark.parametrize(
    "graph", [conv, lambda: conv(quantized=False), lambda: int4((256, 64), 128), lambda: skip(True)]
)
def test_what_is_right_breaks_nothing(tmp_path: Path, graph: Make) -> None:
    assert found(tmp_path, graph()) == []


def test_errors_come_first(tmp_path: Path) -> None:
    levels = [v.level for v in found(tmp_path, conv(sparse(16, 8, 3, 3), scale=np.zeros(16), ending="float"))]
    assert levels == ["error", "warning"]


def test_what_depends_on_backend_and_target(tmp_path: Path) -> None:
    def rules(graph: onnx.ModelProto, **of_situation: str) -> set[str]:
        return {v.rule for v in found(tmp_path, graph, **of_situation)}

    rtx = {"backend": "tensorrt-rtx", "version": "1.7.1"}
    assert rules(conv(dtype="INT4", quantized=False), **rtx) == set()
    assert rules(int4((256, 64), 32), **rtx) == set()
    assert "int4-int8-input" in rules(conv(dtype="INT4"), **rtx)
    nonzero = model([node("NonZero", ["x"], "y")])
    assert "operator" in rules(nonzero, **rtx)
    assert rules(nonzero) == set()
    fp8 = conv(act=activation(dtype="FLOAT8E4M3FN"))
    assert "target-type" in rules(fp8)
    assert "target-type" not in rules(fp8, target="rtx-ada")
    assert "target-type" not in rules(fp8, target="h100")
    brain = model([node("Cast", ["x"], "y", to=TensorProto.BFLOAT16)])
    assert "target-type" in rules(brain, target="rtx-turing")
    assert rules(brain) == set()


def test_subgraphs_and_functions_are_looked_into(tmp_path: Path) -> None:
    inner = helper.make_graph(
        pair("x", "o", "bad"), "then", [], [onnx.ValueInfoProto(name="o")], [tensor("bad", 0.0), tensor("z", 0, "INT8")]
    )
    other = helper.make_graph([node("Identity", ["x"], "p")], "else", [], [onnx.ValueInfoProto(name="p")])
    branch = helper.make_node("If", ["b"], ["y"], name="if", then_branch=inner, else_branch=other)
    assert [v.rule for v in found(tmp_path, model([branch], [tensor("b", True, "INT8")]))] == ["scale-positive"]
    body = helper.make_function(
        "local", "Fake", ["v", "scale"], ["w"],
        [
            node("QuantizeLinear", ["v", "scale"], "q", output_dtype=TensorProto.INT8),
            node("DequantizeLinear", ["q", "scale"], "w"),
        ],
        [helper.make_opsetid("", 21)],
    )  # fmt: skip
    call = helper.make_node("Fake", ["x", "s"], ["y"], name="call", domain="local")
    graph = model([call], [tensor("s", -1.0)], domains=("local",))
    graph.functions.append(body)
    assert [v.rule for v in found(tmp_path, graph)] == ["scale-positive"]
