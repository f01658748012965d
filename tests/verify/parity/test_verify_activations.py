"""Verification of quantized activations: what must pass, and changes that must fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from torch import nn

import slope_compile as sc
from slope_compile.compression.activations import TrainedQuantizer
from slope_compile.compression.api import compress
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.verify.bisect import OnnxSide, explain
from slope_compile.verify.chain.runners import input_names, reference_session
from slope_compile.verify.parity.outputs import require_telling
from slope_compile.verify.parity.segments import behind_choices, moved_by_jitter
from slope_compile.verify.parity.steps import Quantized, StepDifference
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import NotCheckedError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5),
    )  # fmt: skip
    compress(model, activation_bits=8)
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8))
    path = tmp_path_factory.mktemp("activations") / "m.onnx"
    sc.export(model.eval(), torch.randn(6, 3, 8, 8), path)
    return SimpleNamespace(model=model, path=path)


def changed(source: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, folder / "m.onnx")
    golden = source.with_suffix(".golden.safetensors")
    (folder / golden.name).write_bytes(golden.read_bytes())
    return folder / "m.onnx"


def scale_by(factor: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "2.input.scale")
        value = numpy_helper.to_array(tensor) * np.float32(factor)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), tensor.name))

    return change


def bypass(model: onnx.ModelProto) -> None:
    """Take the quantizer of the second convolution out."""
    nodes = {node.name: node for node in model.graph.node}
    source = nodes["2.input.q"].input[0]
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == nodes["2.input.dq"].output[0]:
                node.input[index] = source
    for name in ("2.input.q", "2.input.dq"):
        model.graph.node.remove(nodes[name])


def clip(model: onnx.ModelProto) -> None:
    """Give the second convolution's input 4 bits: a Clip to 0 ... 15 before its QuantizeLinear."""
    index, node = next((i, n) for i, n in enumerate(model.graph.node) if n.name == "2.input.q")
    scale = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "2.input.scale")
    for name, value in (("low", 0.0), ("high", 15 * scale)):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    model.graph.node.insert(index, onnx.helper.make_node("Clip", [node.input[0], "low", "high"], ["clipped"]))
    model.graph.node[index + 1].input[0] = "clipped"


def test_what_was_exported_passes(exported: SimpleNamespace) -> None:
    verdict = sc.verify(exported.path, model=exported.model)
    assert verdict.verdict == "pass"
    figures = verdict["parity.onnx"].figures
    assert figures["quantizers"] == 5
    assert figures["step_share"] == figures["step_off_by_one"] <= figures["step_off_allowed"] < 0.01
    assert figures["step_largest"] <= figures["step_largest_allowed"] == 1
    assert figures["step_beyond"] <= figures["segment_tolerance"] < 1e-5
    assert figures["segment_relative"] <= figures["segment_tolerance"]
    assert "before each quantizer" in figures["derivation"]


@pytest.mark.parametrize(
    ("change", "check", "words"),
    [
        (scale_by(1.01), "codes", "2.input: step"),
        (scale_by(1.01), "parity.onnx", "2.input"),
        (scale_by(1.001), "parity.onnx", "2.input"),
        (bypass, "parity.onnx", "2.input: the trained model quantizes here"),
        (clip, "codes", "2.input: range: levels 0 to 15"),
        (clip, "parity.onnx", "2.input"),
    ],
)
def test_a_changed_quantizer_fails(
    exported: SimpleNamespace, tmp_path: Path, change: Callable[[onnx.ModelProto], None], check: str, words: str
) -> None:
    verdict = sc.verify(changed(exported.path, tmp_path, change), model=exported.model)
    assert verdict.verdict == "fail"
    assert verdict[check].status == "fail"
    assert words in verdict[check].detail


def test_a_zero_point_fails(exported: SimpleNamespace, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "2.input.zero_point")
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(3, np.int8), tensor.name))

    verdict = sc.verify(changed(exported.path, tmp_path, change), model=exported.model)
    assert "2.input: range" in verdict["codes"].detail


def test_between_two_files_the_quantizer_is_named_though_the_first_one_reads_the_input(
    exported: SimpleNamespace, tmp_path: Path
) -> None:
    assert next(n for n in onnx.load(exported.path).graph.node if n.name == "0.input.q").input[0] == "input"
    damaged = changed(exported.path, tmp_path, scale_by(2))
    feed = {"input": np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)}
    found = explain("parity.placed", OnnxSide(exported.path), OnnxSide(damaged), feed, Tolerance(1e-5, ""), None)
    assert found is not None and found.layer == "2.input"
    assert found.cause == "the step of the quantizer 2.input: scale off by a power of two: x 2, everywhere"


def test_swapped_weights_fail(exported: SimpleNamespace, tmp_path: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == "2.weight.codes")
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values[::-1]), tensor.name))

    verdict = sc.verify(changed(exported.path, tmp_path, change), model=exported.model)
    assert "5.input" in verdict["parity.onnx"].detail  # the quantizer behind the layer, and none before it
    assert "2.input" not in verdict["parity.onnx"].detail
    assert verdict["parity.onnx"].status == "fail"


@pytest.mark.parametrize(("change", "status"), [(lambda model: None, "pass"), (scale_by(1.5), "fail")])
def test_without_the_model_outputs_may_move_as_far_as_jitter_moves_them(
    exported: SimpleNamespace, tmp_path: Path, change: Callable[[onnx.ModelProto], None], status: str
) -> None:
    """Of samples whose file does not name the quantizers, as older exports' does not."""
    path = changed(exported.path, tmp_path, change)
    golden = path.with_suffix(".golden.safetensors")
    save_file(load_file(golden), golden)
    found = sc.verify(path)["parity.onnx"]
    assert found.status == status, found.detail
    assert found.figures["tolerance"] < 0.1
    assert "segment_relative" not in found.figures
    assert found.figures["golden_not_told"] == ["quantizers"]
    assert status == "fail" or "whether their model had these is not told" in found.detail


def test_a_tolerance_as_large_as_the_outputs_tells_nothing() -> None:
    require_telling(Tolerance(0.99, ""))
    with pytest.raises(NotCheckedError, match="nothing can be told"):
        require_telling(Tolerance(1.0, ""))


def test_jitter_moves_a_deep_network_at_4_bits_though_each_segment_is_exact(tmp_path: Path) -> None:
    """The reason for comparing segments: from end to end, errors of floats may turn a large share of the integers."""
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 8))
    compress(model, activation_bits=4)
    model(torch.randn(64, 32))
    path, x = tmp_path / "m.onnx", torch.randn(64, 32)
    sc.export(model.eval(), x, path)
    stored = stored_quantizers(path)
    feeds = [{input_names(reference_session(path))[0]: x.numpy()}]
    assert moved_by_jitter(path, stored, feeds, 1e-3) > 0.05
    assert moved_by_jitter(path, stored, feeds, 0.0) == 0.0
    found = sc.verify(path, model=model)["parity.onnx"]
    assert found.status == "pass", found.detail
    assert found.figures["segment_tolerance"] < 1e-4


def test_an_integer_must_be_a_rounding_of_the_trained_value() -> None:
    trained = TrainedQuantizer("q", 4, 0.5, 0, 15)
    read = np.array([0.2499, 0.2499, 1.0, 9.0, -3.0], np.float32)  # / 0.5: 0.4998, 0.4998, 2, 18, -6
    call = Quantized(read, np.array([0, 0, 2, 15, 0], np.int8))
    allowed = Tolerance(1e-4, "")  # of 18 levels: 0.0018
    near, far = StepDifference("q"), StepDifference("q")
    near.add(call, np.array([0, 1, 2, 15, 0], np.int8), trained, allowed)
    far.add(call, np.array([0, 1, 3, 14, -1], np.int8), trained, allowed)
    assert (near.different, near.outside, near.within) == (1, 0, True)
    assert (near.off_by_one, near.largest, near.near, near.reach) == (1, 1, 2, 1)
    assert (far.different, far.outside, far.within) == (4, 3, False)
    assert "3 of 5 integers are no rounding of what was trained, by up to 1 steps" in far.told("what was trained")
    assert far.levels == pytest.approx(0.5)
    broken = StepDifference("q")
    broken.add(Quantized(np.array([np.nan], np.float32), np.zeros(1, np.int8)), np.zeros(1, np.int8), trained, allowed)
    assert broken.outside == 1


def test_choices_are_looked_for_up_to_the_next_quantizer() -> None:
    nodes = [("TopK", "x", "t"), ("Relu", "t", "u"), ("QuantizeLinear", "u", "a"), ("DequantizeLinear", "a", "b"),
             ("QuantizeLinear", "b", "c"), ("QuantizeLinear", "x", "d")]  # fmt: skip
    graph = onnx.helper.make_graph([onnx.helper.make_node(op, [i], [o]) for op, i, o in nodes], "g", [], [])
    assert behind_choices(onnx.helper.make_model(graph), ["a", "c", "d"]) == {"a"}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1e-7, 0.3), st.sampled_from([(-8, 7), (0, 15), (-128, 127)]))
def test_whatever_floats_do_integers_differ_only_where_it_is_allowed(
    seed: int, eps: float, bounds: tuple[int, int]
) -> None:
    """The derivation of docs/verify.md: x' within eps * max|x| of x, both rounded."""
    rng = np.random.default_rng(seed)
    quantizer = TrainedQuantizer("q", 8, 0.25, *bounds)
    x = (rng.standard_normal(500) * rng.uniform(0.1, 20)).astype(np.float32)
    moved = x.astype(np.float64) + eps * np.abs(x).max() * rng.uniform(-1, 1, x.shape)
    trained, found = (np.clip(np.rint(v / np.float64(0.25)), *bounds).astype(np.int16) for v in (x, moved))
    difference = StepDifference("q")
    difference.add(Quantized(x, trained), found, quantizer, Tolerance(eps, ""))
    assert difference.within
    assert difference.largest <= difference.reach and difference.different <= difference.near


def test_more_integers_off_by_one_than_lie_near_a_midpoint_fail() -> None:
    """Each alone could be a rounding; all together are not: half of them lie nowhere near the middle."""
    quantizer = TrainedQuantizer("q", 8, 1.0, 0, 127)
    x = np.array([2.5, 9.4], np.float32)
    turned = StepDifference("q", elements=0)
    turned.add(Quantized(x, np.array([2, 9], np.int8)), np.array([3, 10], np.int8), quantizer, Tolerance(0.02, ""))
    assert (turned.different, turned.near, turned.outside) == (2, 2, 0) and turned.within
    turned.near = 1
    assert not turned.within and "2 of 2 integers are not the trained ones, where 1 may be" in turned.told(
        "the trained ones"
    )
