from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import CheckFailedError, ModelError
from slope_compile.export.passes import run_pass
from slope_compile.export.passes.clean import CleanModel
from slope_compile.export.passes.hold import HoldWeights
from slope_compile.export.passes.optimize import Optimize
from slope_compile.export.passes.quantize import QuantizeWeights
from slope_compile.export.passes.write import WriteModel

CODES = np.arange(-8, 8, dtype=np.int8).reshape(4, 4)
SCALE = np.array([0.5, 0.25, 0.125, 2], dtype=np.float32)
CODED = {"layer.weight": CodedTensor(CODES, SCALE, 4, 0, None)}


def linear(text: str = "", value: np.ndarray | None = None, name: str = "layer.weight") -> ir.Model:
    """A graph with a 4 x 4 weight; `text` says what it does with it."""
    body = text or f't = Transpose <perm = [1, 0]> ("{name}") output = MatMul (input, t)'
    source = (
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[batch, 4] input) => (float[batch, 4] output) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(source)
    weight = CODES * SCALE[:, None] if value is None else value
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return ir.from_proto(proto)


def hold(graph: ir.Model) -> HoldWeights:
    step = HoldWeights(CODED, ["layer.weight", "other.weight"])
    run_pass(step, graph)
    return step


def test_hold_makes_inputs_and_keeps_the_values() -> None:
    graph = linear()
    step = hold(graph)
    assert [value.name for value in graph.graph.inputs] == ["input", "layer.weight"]
    assert not graph.graph.initializers
    assert np.array_equal(step.held["layer.weight"], CODES * SCALE[:, None])


W = '"layer.weight"'


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (linear(name="renamed"), "left no initializer"),
        (linear(f"a = MatMul (input, {W}) t = Transpose ({W}) output = MatMul (a, t)"), "along one axis.*used by"),
        (linear(f"a = Gemm (input, {W}) output = Gemm <transB = 1> (a, {W})"), "along one axis.*used by"),
        (linear(f"a = Gemm <transB = 1> (input, {W}) output = Add (a, {W})"), "used by Gemm '.*', Add"),
        (linear(f"t = Transpose ({W}) a = MatMul (input, t) output = Add (a, t)"), "used by Transpose"),
        (linear(f"output = MatMul ({W}, input)"), "used by MatMul"),
        (linear(f"output = Add (input, {W})"), "used by Add"),
        (linear("output = Identity (input)"), "used by nothing"),
        (linear(f"w = Neg ({W}) output = MatMul (input, w)"), "used by Neg"),
        (linear(value=np.ones((4, 4), np.float16)), "float16"),
        (linear(value=np.ones((2, 8), np.float32)), r"\(2, 8\)"),
        (linear(value=(CODES * SCALE[:, None]).T.copy()), "12 of 16 exported values differ"),
        (linear(value=np.nextafter(CODES * SCALE[:, None], np.float32(9))), "16 of 16 exported values differ"),
    ],
)
def test_hold_refuses_a_weight_that_is_not_the_trained_one(graph: ir.Model, problem: str) -> None:
    with pytest.raises(ModelError, match=rf"(?s)layer 'layer'.*{problem}") as caught:
        hold(graph)
    assert "overrides: {'layer': off}" in caught.value.remedy


def test_negative_zeros_are_not_the_codes_zeros() -> None:
    value = CODES * SCALE[:, None]
    value[CODES == 0] = -0.0
    with pytest.raises(ModelError, match="1 of 16"):
        hold(linear(value=value))


def test_weights_without_codes_stay_where_they_are_used_in_another_way() -> None:
    graph = linear('a = Transpose ("layer.weight") b = MatMul (input, a) output = MatMul (b, "other.weight")')
    shared = linear('b = MatMul (input, "other.weight") output = MatMul (b, "other.weight")')
    added = linear('b = MatMul (input, "other.weight") output = Add (b, "other.weight")')
    for g, held in ((graph, True), (shared, True), (added, False)):
        other = ir.Value(name="other.weight", const_value=ir.tensor(np.eye(4, dtype=np.float32), name="other.weight"))
        [v] = [v for n in g.graph for v in n.inputs if v.name == "other.weight"][:1]
        v.replace_all_uses_with(other)
        g.graph.register_initializer(other)
        step = HoldWeights({}, ["other.weight"])
        run_pass(step, g)
        assert ("other.weight" in step.held) == held


@pytest.mark.parametrize(
    "text",
    [
        f"t = Transpose ({W}) a = MatMul (input, t) output = MatMul (a, t)",
        f"t = Transpose ({W}) u = Transpose ({W}) a = MatMul (input, t) output = MatMul (a, u)",
        f"a = Gemm <transB = 1> (input, {W}) u = Transpose ({W}) output = MatMul (a, u)",
    ],
)
def test_a_weight_that_several_layers_share_is_held_once(text: str, tmp_path: Path) -> None:
    graph = linear(text)
    held = hold(graph).held
    run_pass(Optimize(21), graph)
    quantize = QuantizeWeights(held, CODED, 21)
    run_pass(quantize, graph)
    run_pass(CleanModel(), graph)
    assert [node.op_type for node in graph.graph].count("DequantizeLinear") == 1
    write = WriteModel(tmp_path / "m.onnx", CODED, quantize.placements)
    run_pass(write, graph)
    assert {weight.name for weight in write.weights} == {"layer.weight"}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    weight = CODES * SCALE[:, None]
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"input": x})[0], x @ weight.T @ weight.T, rtol=1e-6)


def test_folding_cannot_reach_a_held_weight() -> None:
    graph = linear('t = Transpose <perm = [1, 0]> ("layer.weight") output = MatMul (input, t)')
    held = hold(graph).held
    run_pass(Optimize(21), graph)
    assert [node.op_type for node in graph.graph] == ["Transpose", "MatMul"]
    quantize = QuantizeWeights(held, CODED, 21)
    run_pass(quantize, graph)
    assert [node.op_type for node in graph.graph] == ["DequantizeLinear", "Transpose", "MatMul"]
    assert quantize.placements["layer.weight"][0] == "MatMul"
    assert set(graph.graph.initializers) == {"layer.weight.codes", "layer.weight.scale"}


def test_quantize_refuses_names_that_are_taken() -> None:
    graph = linear()
    held = hold(graph).held
    taken = ir.Value(name="layer.weight.scale", const_value=ir.tensor(np.ones(1), name="layer.weight.scale"))
    graph.graph.register_initializer(taken)
    with pytest.raises(ModelError, match=r"already has a value 'layer\.weight\.scale'"):
        run_pass(QuantizeWeights(held, CODED, 21), graph)


def test_quantize_refuses_a_held_weight_that_was_lost() -> None:
    graph = linear()
    held = hold(graph).held
    graph.graph.inputs.pop()
    with pytest.raises(ModelError, match=r"no longer multiplies with 'layer\.weight'"):
        run_pass(QuantizeWeights(held, CODED, 21), graph)


def test_a_changed_operator_set_is_a_bug_of_ours() -> None:
    with pytest.raises(ir.passes.PostconditionError, match="opsets"):
        run_pass(Optimize(22), linear())


def test_clean_leaves_no_metadata(fresh_graph: Callable[[], ir.Model]) -> None:
    graph = fresh_graph()
    content = ir.to_proto(graph).SerializeToString()
    assert b"stack_trace" in content and b".py" in content
    run_pass(CleanModel(), graph)
    content = ir.to_proto(graph).SerializeToString()
    assert b"stack_trace" not in content and b".py" not in content
    assert graph.producer_name == "slope-compile"


@pytest.fixture
def written(fresh_graph: Callable[[], ir.Model], exported: SimpleNamespace) -> Callable[..., WriteModel]:
    """Quantizes the conv net with its own codes and writes it, claiming other codes."""

    def write(path: Path, claimed: dict[str, CodedTensor], containers: dict[str, str] | None = None) -> WriteModel:
        graph = fresh_graph()
        hold = HoldWeights(exported.codes, list(exported.codes))
        run_pass(hold, graph)
        quantize = QuantizeWeights(hold.held, exported.codes, 21)
        run_pass(quantize, graph)
        placements = dict(quantize.placements)
        for name, container in (containers or {}).items():
            op, placement = placements[name]
            placements[name] = op, replace(placement, container=container)
        step = WriteModel(path, claimed, placements)
        run_pass(step, graph)
        return step

    return write


def test_the_written_bytes_are_read_back(written: Callable, exported: SimpleNamespace, tmp_path: Path) -> None:
    step = written(tmp_path / "m.onnx", exported.codes)
    assert {w.name for w in step.weights} == {"0.weight", *exported.codes}
    assert (tmp_path / "m.onnx").stat().st_size > 0


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: replace(t, codes=np.roll(t.codes, 1, axis=0)), "codes"),
        (lambda t: replace(t, scale=np.nextafter(t.scale, np.float32(1))), "scale"),
        (lambda t: replace(t, pattern=(1, 4)), "pattern"),
        (lambda t: replace(t, bits=2), "range"),
        (lambda t: replace(t, codes=t.codes[:8], scale=t.scale[:8]), "shape"),
    ],
)
def test_bytes_that_are_not_the_trained_ones_fail(
    written: Callable, exported: SimpleNamespace, tmp_path: Path, change: Callable, rule: str
) -> None:
    claimed = exported.codes | {"3.weight": change(exported.codes["3.weight"])}
    with pytest.raises(CheckFailedError, match=rf"m\.onnx does not hold what was trained.*3\.weight: {rule}"):
        written(tmp_path / "m.onnx", claimed)


def test_a_float_left_behind_or_a_wrong_container_fails(
    written: Callable, exported: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(CheckFailedError, match=r"0\.weight: (range|codes)"):
        written(tmp_path / "m.onnx", exported.codes | {"0.weight": exported.codes["3.weight"]})
    with pytest.raises(CheckFailedError, match=r"3\.weight: container: INT4, placed in INT8"):
        written(tmp_path / "m.onnx", exported.codes, {"3.weight": "INT8"})


def test_a_disk_that_refuses_shows_as_oserror(written: Callable, exported: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        written(tmp_path / "missing" / "m.onnx", exported.codes)
