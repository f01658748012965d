"""Verification of quantized activations: what must pass, and changes that must fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import slope_compile as sc
from slope_compile.compression.api import compress
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.verify.tolerance import tolerance_of


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
    assert figures["step_share"] <= 0.001
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


def test_the_tolerance_grows_with_coarse_quantizers(exported: SimpleNamespace) -> None:
    found = stored_quantizers(exported.path)
    assert tolerance_of([], quantizers=found).relative == pytest.approx((0.01 * 5 * 4 / 127) ** 0.5, rel=1e-3)
    assert tolerance_of([]).relative < 1e-6
