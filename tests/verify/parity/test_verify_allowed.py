"""What widens a tolerance, and what must not."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from verify_twins import make_codes, make_twin

from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity import segments
from slope_compile.verify.parity.allowed import live_weights, of_default
from slope_compile.verify.parity.tolerance import Tolerance, in_eight_bits, tolerance_of

NOTHING = Tolerance(0.0, "nothing")


def dead_products(model: onnx.ModelProto) -> None:
    """Sixty products with half-precision weights that no output depends on."""
    for index in range(60):
        ones = np.ones((1, 1), np.float16)
        model.graph.initializer.append(numpy_helper.from_array(ones, f"dead{index}"))
        model.graph.node.append(helper.make_node("MatMul", [f"dead{index}"] * 2, [f"unused{index}"]))


def test_what_no_output_depends_on_does_not_widen_it(tmp_path: Path) -> None:
    twin = make_twin()
    plain, padded = twin.write(tmp_path / "m.onnx"), twin.write(tmp_path / "n.onnx", dead_products)
    assert len(coded_weights(padded)) > len(coded_weights(plain))
    assert tolerance_of(live_weights(padded)) == tolerance_of(live_weights(plain)) == tolerance_of(coded_weights(plain))


def test_what_a_branch_reads_is_alive(tmp_path: Path) -> None:
    """The weight is an initializer of the main graph, and the product stands in a branch."""

    def branch(model: onnx.ModelProto) -> None:
        last = model.graph.node[-1]
        output = last.output[0]
        last.output[0] = "before"
        bodies = [
            helper.make_graph(
                [helper.make_node("MatMul", ["before", "square"], [name])],
                name,
                [],
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)],
            )
            for name in ("yes", "no")
        ]
        classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
        square = np.eye(classes, dtype=np.float32)
        model.graph.initializer.extend(
            [numpy_helper.from_array(square, "square"), numpy_helper.from_array(np.asarray(True), "always")]
        )
        model.graph.node.append(
            helper.make_node("If", ["always"], [output], then_branch=bodies[0], else_branch=bodies[1])
        )

    path = make_twin().write(tmp_path / "m.onnx", branch)
    assert "square" in {weight.name for weight in live_weights(path)}


def test_one_layer_of_float16_widens_it_by_one_layer(tmp_path: Path) -> None:
    half = replace(make_twin(), half_scales=True, codes=make_codes(power_of_two_scales=True))
    weights = coded_weights(half.write(tmp_path / "m.onnx"))
    one = [weights[0], *(replace(weight, value_dtype="FLOAT") for weight in weights[1:])]
    none = [replace(weight, value_dtype="FLOAT") for weight in weights]
    assert tolerance_of(one).relative - tolerance_of(none).relative == pytest.approx(2.0**-10)


def test_products_that_onnx_runtime_makes_in_8_bits_widen_it_by_their_blocks(tmp_path: Path) -> None:
    straight = make_twin().write(tmp_path / "m.onnx")
    assert of_default(NOTHING, straight, []) == NOTHING  # it leaves a Gemm with transB alone
    turned = replace(make_twin(), turned_fc=True).write(tmp_path / "n.onnx")
    assert of_default(NOTHING, turned, []).relative == pytest.approx(2 * math.sqrt(32) / (127 * math.sqrt(12)))
    assert in_eight_bits(NOTHING, [32, 128]).relative == pytest.approx(2 * math.sqrt(160) / (127 * math.sqrt(12)))


def test_a_bias_off_by_its_last_bit_is_found_though_outputs_do_not_tell(tmp_path: Path) -> None:
    import torch
    from torch import nn

    import slope_compile as sc

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)).eval()
    sc.compress(model, bits=4)
    sc.export(model, torch.randn(3, 4, 4, 4), tmp_path / "m.onnx")
    assert sc.verify(tmp_path / "m.onnx", model=model)["parity.onnx"].status == "pass"
    file = onnx.load(tmp_path / "m.onnx")
    (bias,) = [one for one in file.graph.initializer if one.name == "1.bias"]
    values = numpy_helper.to_array(bias)
    bias.CopyFrom(numpy_helper.from_array(np.nextafter(values, np.float32(9)), "1.bias"))
    onnx.save(file, tmp_path / "m.onnx")
    found = sc.verify(tmp_path / "m.onnx", model=model)["parity.onnx"]
    assert found.status == "fail" and "1.bias: 8 of 8 values are not the trained ones" in found.detail


def test_jitter_grows_until_an_integer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """An integer that turns once in a hundred draws moves the outputs as far as one that turns in each."""
    sizes: list[float] = []

    def jittered(path: Path, stored: Any, eps: float, seed: int) -> float:
        sizes.append(eps)
        return eps

    still = {"y": np.asarray([2.0])}
    monkeypatch.setattr(segments, "load_model", lambda path: 0.0)
    monkeypatch.setattr(segments, "_jittered", jittered)
    monkeypatch.setattr(segments, "_session", lambda model, path: model)
    monkeypatch.setattr(segments, "_run", lambda eps, feed: {"y": np.asarray([2.5])} if eps > 3e-5 else still)
    assert segments.moved_by_jitter(Path("m"), [], [{}], 1e-6) == 0.25
    assert sizes == pytest.approx([1e-6] * 3 + [4e-6] * 3 + [1.6e-5] * 3 + [6.4e-5] * 3)
    assert segments.moved_by_jitter(Path("m"), [], [{}], 1e-9) == 0.0


def test_default_optimizations_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slope_compile.verify.chain import places as chain

    twin = make_twin()
    path, golden = twin.write(tmp_path / "m.onnx"), twin.golden(tmp_path / "g")
    assert verify_model(path, golden=golden)["parity.onnx-default"].status == "pass"
    edited = twin.write(tmp_path / "n.onnx", _louder)
    monkeypatch.setattr(chain, "default_session", lambda _: chain.reference_session(edited))
    verdict = verify_model(path, golden=golden)
    assert verdict["parity.onnx-default"].status == verdict["agreement"].status == "fail"
    assert verdict["parity.onnx"].status == "pass"


def _louder(model: onnx.ModelProto) -> None:
    (scale,) = [one for one in model.graph.initializer if one.name == "fc.weight.scale"]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), scale.name))
