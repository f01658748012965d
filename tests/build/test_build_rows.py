"""Rows and counts, from real and made-up layer lists, against the figures that stand in the lists themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_nets import coded, sparse_codes, tensor

from slope_compile.build.counts import summarize, summary_line
from slope_compile.build.rows import engine_rows
from slope_compile.placement.choose import Place
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.backends import BACKENDS

DATA = Path(__file__).parent / "data"
RTX, TRT = BACKENDS["tensorrt-rtx"], BACKENDS["tensorrt"]
SHAPES = {"stem": (64, 3, 3, 3), "body": (128, 64, 3, 3), "down": (128, 128, 1, 1), "side": (64, 128, 1, 1)}


def weight(name: str, shape: tuple[int, ...], dtype: str, node: str, op: str = "Conv") -> CodedWeight:
    codes = sparse_codes(shape, -7, 7) if dtype.startswith("INT") else np.ones(shape, np.float32)
    return CodedWeight(f"{name}.weight", codes, dtype, None, None, None, 0, "FLOAT", op, node, (), 1)


def model(*weights: CodedWeight) -> onnx.GraphProto:
    nodes: list[Any] = []
    tensors = []
    for one in weights:
        if one.codes is None:
            tensors.append(tensor(one.name, one.stored, one.dtype))
        else:
            made, node = coded(one.name, one.stored, np.float32(0.5), one.dtype)
            tensors += made
            nodes.append(node)
        nodes.append(helper.make_node(one.op, ["x", one.name], [f"{one.node}.out"], name=one.node))
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    return helper.make_graph(nodes, "g", [info], [info], tensors)


def read(
    weights: Sequence[CodedWeight], placements: Sequence[str], log: str = "", inspector: str = "", backend: Any = TRT
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    places = [Place(w.dtype, p, "because") for w, p in zip(weights, placements, strict=True)]
    rows = engine_rows(weights, places, model(*weights), log, backend, None, inspector)
    return {row["name"].removesuffix(".weight"): row for row in rows}, summarize(rows, log, backend, inspector)


def convolutions() -> list[CodedWeight]:
    return [weight(name, shape, "INT8", f"{name}.conv") for name, shape in SHAPES.items()]


def test_inspector_of_tensorrt_10() -> None:
    head = weight("head", (10, 128), "INT4", "head.fc", "Gemm")
    inspector = (DATA / "inspector10.json").read_text()
    rows, summary = read([*convolutions(), head], ["sparse-int8"] * 4 + ["int4-weight"], inspector=inspector)
    assert [rows[name]["engine"]["sparse_chosen"] for name in rows] == [False, True, False, False, False]
    assert [rows[name]["engine"]["sparse_eligible"] for name in rows] == [False, True, True, True, None]
    assert rows["head"]["engine"]["sparse_note"] == "eligible not checked: the build log has no (Sparsity) lines"
    assert all(row["engine"]["held"] for row in rows.values())
    assert rows["body"]["engine"]["fused_with"] == ["body.relu"]
    assert "sparse_conv" in rows["body"]["engine"]["tactic"]
    assert summary["sparse"] == {
        "eligible": 2,  # engine layers: `down` and `side` became one
        "eligible_by": "HasSparseWeights",
        "chosen": 1,
        "chosen_by": "kernel names",
        "fits_2_4": 4,  # our own count: the 3 channels of `stem` are no group of 4
        "possible": 3,  # `head` is multiplied as FP16 and stored as INT4: no kernel reads its zeros
    }
    assert (summary["int8"], summary["int4"]) == ({"declared": 4, "multiplied": 4}, {"held": 1, "fused": 0})
    assert (summary["held"], summary["float"], summary["read_from"]) == (5, 0, "engine inspector")
    assert summary["line"] == "2 of 5 layers eligible for sparse kernels, 1 chosen; INT4 fused in 0; float left in 0"


def test_types_that_the_inspector_does_not_say() -> None:
    """With dynamic shapes TensorRT writes no formats; the kernel's name may still tell what it multiplies."""
    weights = [
        weight("body", (128, 64, 3, 3), "INT8", "body.conv"),
        weight("next", (128, 128, 3, 3), "INT8", "next.conv"),
    ]
    rows, summary = read(weights, ["sparse-int8"] * 2, inspector=(DATA / "inspector11.json").read_text())
    assert rows["body"]["engine"]["int8_product"] is True
    assert rows["next"]["engine"]["int8_product"] is None
    assert rows["next"]["engine"]["held"]
    assert "was not checked" in rows["next"]["engine"]["note"]
    assert summary["int8"] == {"declared": 2, "multiplied": None}


def test_merged_weights_share_the_bytes_of_their_constant() -> None:
    weights = [weight(name, (64, 64), "INT8", f"{name}.fc", "Gemm") for name in ("q", "k", "v")]
    rows, summary = read(weights, ["sparse-int8"] * 3, inspector=(DATA / "inspector11.json").read_text())
    assert summary["weight_bytes"] == 3 * 64 * 64
    assert all(row["engine"]["sparse_chosen"] and row["engine"]["int8_product"] for row in rows.values())


def test_log_lines_say_what_is_eligible_and_chosen() -> None:
    log = (DATA / "trt10.txt").read_text()
    weights = [
        weight("body.conv", (128, 64, 3, 3), "INT8", "body.conv"),
        weight("head", (10, 128), "INT4", "head.fc", "Gemm"),
    ]
    rows, summary = read(weights, ["sparse-int8", "int4-weight"], log)
    body, head = rows["body.conv"]["engine"], rows["head"]["engine"]
    assert (body["sparse_eligible"], body["sparse_chosen"], body["sparse_note"]) == (True, True, None)
    assert (head["sparse_eligible"], head["sparse_chosen"], head["held"]) == (True, False, False)
    assert summary["line"] == "3 of 2 layers eligible for sparse kernels, 1 chosen; INT4 fused in 0; float left in 1"
    assert summary["sparse"]["eligible_by"] == summary["sparse"]["chosen_by"] == "log line"


@pytest.mark.parametrize(
    ("lines", "counts", "of_body"),
    [
        ("Found 39 layer(s) eligible to use sparse tactics\n(Sparsity) Chose 7 layer(s) using sparse tactics", (39, 7),
         (None, False)),
        ("Found 39 layer(s) eligible to use sparse tactics\n(Sparsity) Chose 0 layer(s) using sparse tactics", (39, 0),
         (None, False)),
        ("Layers eligible for sparse math: a, body.conv + body.relu\n"
         "(Sparsity) TRT inference plan picked sparse implementation for layers: body.conv + body.relu", (2, 1),
         (True, True)),
        ("Layers eligible for sparse math:\n"
         "(Sparsity) TRT inference plan picked sparse implementation for layers:", (0, 0), (False, False)),
    ],
)  # fmt: skip
def test_wordings(lines: str, counts: tuple[int, int], of_body: tuple[bool | None, bool | None]) -> None:
    log = (DATA / "trt10.txt").read_text().replace("sparse_conv", "dense_conv")
    log = f"(Sparsity) {lines}\n" + log[log.index("[I] [TRT] Engine generation") :]
    rows, summary = read([weight("body.conv", (128, 64, 3, 3), "INT8", "body.conv")], ["sparse-int8"], log)
    engine = rows["body.conv"]["engine"]
    assert (summary["sparse"]["eligible"], summary["sparse"]["chosen"]) == counts
    assert (engine["sparse_eligible"], engine["sparse_chosen"]) == of_body


def test_a_backend_that_chooses_at_run_time() -> None:
    names = {"conv1": (64, 3, 3, 3), "layer1.0.conv1": (64, 64, 3, 3), "fc": (10, 512)}
    nodes = {"conv1": "node_Conv_291", "layer1.0.conv1": "node_Conv_292", "fc": "node_linear"}
    types = {"conv1": "INT8", "layer1.0.conv1": "INT4", "fc": "INT8"}
    weights = [weight(n, names[n], types[n], nodes[n], "Gemm" if n == "fc" else "Conv") for n in names]
    log = (DATA / "rtx.txt").read_text()
    rows, summary = read(weights, ["int8-weight", "int4-storage", "int8-weight"], log, backend=RTX)
    engine = rows["fc"]["engine"]
    assert (engine["fused"], engine["sparse_eligible"], engine["sparse_chosen"]) == (True, None, None)
    assert "TensorRT-RTX chooses kernels at run time" in engine["sparse_note"]
    assert summary["sparse"]["fits_2_4"] == 2
    assert summary["line"] == (
        "0 of 3 layers eligible for sparse kernels (own count: 2:4, multiplied as INT8 or held as FP16; the build log "
        "has no (Sparsity) lines), chosen not checked: TensorRT-RTX chooses kernels at run time; INT4 fused in 0; "
        "float left in 0"
    )


def test_no_layer_list_at_all() -> None:
    rows, summary = read([weight("body", (128, 64, 3, 3), "INT8", "body.conv")], ["sparse-int8"])
    engine = rows["body"]["engine"]
    assert (engine["layer"], engine["fused"], engine["sparse_chosen"], engine["held"]) == (None, None, None, False)
    assert summary["read_from"] == "nowhere"
    assert [summary["sparse"]["chosen"], summary["int4"]["fused"], summary["int8"]["multiplied"]] == [None] * 3
    assert [summary[key] for key in ("held", "not_held", "float")] == [None] * 3
    assert summary["line"].endswith(
        "; float left in not checked: neither the engine inspector nor the build log has a layer list"
    )
    assert "INT4 fused not checked: neither the engine inspector nor the build log" in summary["line"]
    assert "chosen not checked: the build log has no (Sparsity) lines" in summary["line"]


def test_a_coded_weight_without_a_constant() -> None:
    """The list is there and does not show it: its type is unknown, so nobody knows whether it is a float."""
    weights = [*convolutions(), weight("lost", (7, 5), "INT4", "lost.fc", "Gemm")]
    inspector = (DATA / "inspector10.json").read_text()
    rows, summary = read(weights, ["sparse-int8"] * 4 + ["int4-weight"], inspector=inspector)
    assert rows["lost"]["engine"]["dtype"] is None
    assert (summary["held"], summary["not_held"], summary["not_found"]) == (4, ["lost.weight"], ["lost.weight"])
    assert summary["float"] is None
    assert summary["line"].endswith(
        "float left in not checked: the engine's layer list shows no constant for lost.weight"
    )


def test_float_left() -> None:
    """Placed in float, or held in float against the declaration; the constants of sparse-fp16 are meant to be FP16."""
    list_of = "Layers:\n" + "\n".join(
        f"Name: {n}.conv, LayerType: CaskConvolution, Inputs: [ {{ Name: x, Location: Device, Dimensions: [1,8,4,4], "
        f'Format/Datatype: Half }}], Outputs: [], Weights: {{"Type": "Half", "Count": 128}}, HasSparseWeights: 1, '
        f"TacticName: sm80_xmma_fprop_sparse_f16, TacticValue: 0x1, StreamId: 0, Metadata: [ONNX Layer: {n}.conv]"
        for n in ("a", "b", "c", "d")
    )
    weights = [weight(n, (16, 8, 1, 1), t, f"{n}.conv") for n, t in (("a", "FLOAT"), ("b", "INT8"), ("c", "INT4"))]
    rows, summary = read(weights, ["sparse-fp16", "int8-weight", "float"], list_of)
    assert summary["float"] == 2
    assert summary["sparse"]["possible"] == 2  # `a` is dense here
    assert rows["b"]["engine"]["note"] == "declared INT8, engine holds Half"
    assert summary_line(summary) == summary["line"]


def test_rows_that_the_export_described() -> None:
    one = weight("body", (128, 64, 3, 3), "INT8", "body.conv")
    export = {
        "layers": [
            {"name": "gone.weight", "reason": "r", "placement": "float", "bits": None},
            {"name": "body.weight", "reason": "exported", "placement": "int4-storage", "bits": 4, "pattern": "2:4"},
        ]
    }
    place = Place("INT8", "float", "an override")
    gone, body = engine_rows([one], [place], model(one), "", TRT, export)
    assert (gone["fits_2_4"], gone["engine"]["held"], gone["engine"]["sparse_chosen"]) == (None, False, None)
    assert (body["reason"], body["fits_2_4"]) == ("an override", True)  # coded, and left in float here
    summary = summarize([gone, body], "", TRT)
    assert (summary["coded"], summary["float"]) == (0, None)  # what is placed so is not what the engine has
