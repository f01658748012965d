from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save_file
from verify_twins import BLOCK, CHANNELS, HIDDEN, SIDE, Twin, initializer, make_codes, make_twin, node, tensor_of

from slope_compile.codes_file import save_codes
from slope_compile.events import Events
from slope_compile.verify.model import verify_model
from slope_compile.verify.verdict import Verdict

NAMES = [
    "digest", "pattern", "codes", "packed", "repeatable", "parity.folded", "parity.onnx", "parity.onnx-default",
    "parity.placed", "parity.engine", "engine.layers", "agreement", "metric",
]  # fmt: skip


def judge(twin: Twin, folder: Path, edit: Callable[[onnx.ModelProto], None] | None = None) -> Verdict:
    """Verify an edited file against the unedited twin."""
    return verify_model(twin.write(folder / "m.onnx", edit), codes=twin.codes, model=twin.model())


def failed(verdict: Verdict) -> list[str]:
    return [check.name for check in verdict.checks if check.status == "fail"]


def test_what_the_model_was_exported_to_passes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors")
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, model=twin.model(), golden=golden)
    assert verdict.verdict == "pass"
    assert [check.name for check in verdict.checks] == NAMES
    status = {check.name: check.status for check in verdict.checks}
    not_checked = ("digest", "packed", "parity.folded", "parity.placed", "parity.engine", "engine.layers", "metric")
    assert status == dict.fromkeys(NAMES, "pass") | dict.fromkeys(not_checked, "not checked")
    assert "no parametrized weights" in verdict["parity.folded"].detail
    assert verdict["codes"].figures == {
        "tensors": 3, "codes": 576 + 256 + 192, "trained_weights_compared": True, "failing": [],
    }  # fmt: skip
    assert verdict["pattern"].figures == {
        "tensors": 3, "with_pattern": 2, "failing": [], "not_examined": [],
        "files": {"m.onnx": {"weights": {"tensors": 3, "elements": 1024}, "floats": {"tensors": 4, "elements": 27}}},
    }  # fmt: skip
    parity = verdict["parity.onnx"].figures
    assert parity["top1_agreement"] == 1 and parity["samples"] == 5 and parity["golden_relative"] == 0
    assert parity["relative"] <= parity["tolerance"] / 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "change",
    [
        {"container": "INT8"},
        {"opset": 25},
        {"opset": 23, "container": "INT8"},
        {"turned_fc": True},
        {"half_scales": True, "codes": make_codes(power_of_two_scales=True)},
        {"codes": make_codes(bits=3)},
        {"codes": make_codes(bits=2), "container": "INT2", "opset": 25},
        {"codes": make_codes(bits=8), "container": "INT8"},
    ],
    ids=["INT8", "opset 25", "opset 23", "transB=0", "float16 scales", "3 bits", "INT2", "8 bits"],
)
def test_correct_variants_pass(change: dict[str, Any], tmp_path: Path) -> None:
    verdict = judge(replace(make_twin(), **change), tmp_path)
    assert verdict.verdict == "pass", [check.detail for check in verdict.checks]
    assert verdict["codes"].status == verdict["pattern"].status == verdict["parity.onnx"].status == "pass"


def flip_a_nibble(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "conv1.weight.codes")
    codes = numpy_helper.to_array(tensor).astype(np.int8).ravel()
    # An odd code keeps being nonzero when its second bit turns: -8...7 in two's complement.
    place = next(i for i in range(0, codes.size, 2) if codes[i] % 2)
    raw = bytearray(tensor.raw_data)
    raw[place // 2] ^= 0x02
    tensor.raw_data = bytes(raw)


def set_scale(name: str, value: float) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = initializer(model, f"{name}.scale")
        scale = numpy_helper.to_array(tensor).copy()
        scale.reshape(-1)[-1] *= value
        tensor.CopyFrom(numpy_helper.from_array(scale, tensor.name))

    return edit


def violate_the_mask(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "conv2.weight.codes")
    codes = numpy_helper.to_array(tensor).astype(np.int8)
    codes[7, 0] = 1  # channels 1 and 3 are taken
    tensor.CopyFrom(tensor_of(codes, tensor.name, "INT4"))


def transpose(name: str, in_place: bool) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensor = initializer(model, f"{name}.codes")
        codes = numpy_helper.to_array(tensor).astype(np.int8)
        turned = codes.swapaxes(0, 1)
        tensor.CopyFrom(tensor_of(turned.reshape(codes.shape) if in_place else turned, tensor.name, "INT4"))

    return edit


def zero_point_one(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(tensor_of(np.ones((), np.int8), "one", "INT4"))
    node(model, "conv2.weight.dq").input.append("one")


def wrong_axis(model: onnx.ModelProto) -> None:
    node(model, "conv1.weight.dq").attribute[0].i = 1


def rename(model: onnx.ModelProto) -> None:
    initializer(model, "conv2.weight.codes").name = "stranger.weight.codes"
    node(model, "conv2.weight.dq").input[0] = "stranger.weight.codes"


def leave_in_float(model: onnx.ModelProto) -> None:
    dequantize = node(model, "conv2.weight.dq")
    codes, scale = (numpy_helper.to_array(initializer(model, name)) for name in dequantize.input)
    values = codes.astype(np.float32) * scale
    model.graph.initializer.append(numpy_helper.from_array(values, "conv2.weight"))
    model.graph.node.remove(dequantize)


def feed_from_outside(model: onnx.ModelProto) -> None:
    model.graph.node.remove(node(model, "conv2.weight.dq"))
    shape = [HIDDEN, CHANNELS, 1, 1]
    model.graph.input.append(helper.make_tensor_value_info("conv2.weight", onnx.TensorProto.FLOAT, shape))


@pytest.mark.parametrize(
    ("edit", "tensor", "failing", "words"),
    [
        (flip_a_nibble, "conv1.weight", {"codes"}, "1 of 576"),
        (set_scale("conv1.weight", -1.0), "conv1.weight", {"pattern", "codes", "parity.onnx"}, "scale"),
        (set_scale("conv1.weight", float("nan")), "conv1.weight", {"pattern", "codes", "parity.onnx"}, "scale"),
        (set_scale("conv1.weight", 0.0), "conv1.weight", {"pattern", "codes", "parity.onnx"}, "scale"),
        (set_scale("conv1.weight", 2.0), "conv1.weight", {"codes", "parity.onnx"}, "scale"),
        (set_scale("fc.weight", 1.0000001), "fc.weight", {"codes"}, "scale"),  # one unit in the last place, one block
        (violate_the_mask, "conv2.weight", {"pattern", "codes", "parity.onnx"}, "1 of 256"),
        (transpose("conv1.weight", True), "conv1.weight", {"pattern", "codes", "parity.onnx"}, "transposed"),
        (transpose("conv2.weight", True), "conv2.weight", {"pattern", "codes", "parity.onnx"}, "of 256"),
        (transpose("conv2.weight", False), "conv2.weight", {"pattern", "codes", "parity.onnx"}, "[8, 32, 1, 1]"),
        (transpose("fc.weight", False), "fc.weight", {"pattern", "codes", "parity.onnx"}, "scale of shape"),
        (zero_point_one, "conv2.weight", {"pattern", "codes", "parity.onnx"}, "zero point"),
        (wrong_axis, "conv1.weight", {"codes", "parity.onnx"}, "scale"),
        (rename, "conv2.weight", {"codes"}, "missing"),
        (leave_in_float, "conv2.weight", {"pattern", "codes"}, "FLOAT"),
        (feed_from_outside, "conv2.weight", {"codes", "parity.onnx"}, "missing"),
    ],
    ids=[
        "nibble flipped",
        "scale negative",
        "scale NaN",
        "scale zero",
        "scale doubled",
        "scale of one block",
        "mask violated",
        "square transposed",
        "bytes transposed",
        "shape transposed",
        "blocked transposed",
        "zero point",
        "scale axis",
        "renamed",
        "left in float",
        "fed from outside",
    ],
)
def test_every_damage_fails_its_checks_and_names_the_tensor(
    edit: Callable[[onnx.ModelProto], None], tensor: str, failing: set[str], words: str, tmp_path: Path
) -> None:
    verdict = judge(make_twin(), tmp_path, edit)
    assert verdict.verdict == "fail"
    assert [check.name for check in verdict.checks] == NAMES
    assert failing <= set(failed(verdict)), [check.detail for check in verdict.checks]
    assert {"pattern", "codes"} & set(failed(verdict)) == {"pattern", "codes"} & failing
    assert words in verdict["codes"].detail
    for name in failing & {"pattern", "codes"}:
        assert tensor in verdict[name].detail


def test_a_stranger_in_the_file_is_named(tmp_path: Path) -> None:
    detail = judge(make_twin(), tmp_path, rename)["codes"].detail
    assert "stranger.weight: extra" in detail


def test_a_gemm_that_reads_a_square_matrix_the_wrong_way_round_fails(tmp_path: Path) -> None:
    twin = make_twin()
    codes = np.random.default_rng(3).integers(-8, 7, (4, 4), endpoint=True).astype(np.int8)
    square = {"fc.weight": replace(twin.codes["fc.weight"], codes=codes, scale=np.full(4, 0.5, np.float32))}
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.weight.codes", "fc.weight.scale"], ["fc.weight"], axis=0),
        helper.make_node("Gemm", ["input", "fc.weight"], ["output"], transB=0),
    ]
    values = [helper.make_tensor_value_info(name, 1, ["batch", 4]) for name in ("input", "output")]
    stored = [
        tensor_of(codes, "fc.weight.codes", "INT4"),
        numpy_helper.from_array(np.full(4, 0.5, np.float32), "fc.weight.scale"),
    ]
    graph = helper.make_graph(nodes, "square", values[:1], values[1:], stored)
    (tmp_path / "m.onnx").write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    )
    verdict = verify_model(tmp_path / "m.onnx", codes=square)
    assert failed(verdict) == ["codes"]
    assert "transposed" in verdict["codes"].detail
    assert verdict["parity.onnx"].status == "not checked"


def test_codes_outside_the_declared_bits_fail_though_the_container_holds_them(tmp_path: Path) -> None:
    twin = replace(make_twin(), container="INT8")
    declared = {name: replace(coded, bits=3) for name, coded in twin.codes.items()}
    path = twin.write(tmp_path / "m.onnx")
    verdict = verify_model(path, codes=declared)
    assert failed(verdict) == ["pattern"]
    assert verdict["pattern"].figures["failing"] == ["conv1.weight", "conv2.weight", "fc.weight"]
    assert "[-4, 3]" in verdict["pattern"].detail


def test_scales_that_float16_rounds_fail(tmp_path: Path) -> None:
    verdict = judge(replace(make_twin(), half_scales=True), tmp_path)
    assert "codes" in failed(verdict)
    assert "parity.onnx" not in failed(verdict)  # within what float16 allows


def test_a_checkpoint_of_another_training_fails(tmp_path: Path) -> None:
    twin = make_twin()
    other = twin.model()
    with torch.no_grad():
        other.conv1.weight[1, 1, 1, 1] += 0.25
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, model=other)
    assert failed(verdict) == ["codes", "parity.onnx", "agreement"]
    assert "conv1.weight: trained: codes x scale differs from the trained weight in 1 of 576" in verdict["codes"].detail


def test_stale_golden_outputs_fail(tmp_path: Path) -> None:
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors")
    tensors = load_file(golden)
    save_file({"inputs": tensors["inputs"], "outputs": tensors["outputs"] * np.float32(1.01)}, golden)
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, model=twin.model(), golden=golden)
    assert failed(verdict) == ["parity.onnx"]
    assert "golden outputs are not the trained model's" in verdict["parity.onnx"].detail
    without_model = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, golden=golden)
    assert failed(without_model) == ["parity.onnx", "agreement"]
    assert "against the golden outputs" in without_model["parity.onnx"].detail


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing", "empty samples"])
def test_a_damaged_golden_file_fails_parity_only(damage: str, tmp_path: Path) -> None:
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors")
    if damage == "truncated":
        golden.write_bytes(golden.read_bytes()[:-9])
    elif damage == "foreign":
        save_file({"weights": np.zeros(3, np.float32)}, golden)
    elif damage == "missing":
        golden.unlink()
    else:
        save_file(
            {"inputs": np.zeros((0, CHANNELS, SIDE, SIDE), np.float32), "outputs": np.zeros((0, 6), np.float32)}, golden
        )
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, model=twin.model(), golden=golden)
    assert failed(verdict) == ["parity.onnx", "parity.onnx-default", "agreement"]
    assert "g.safetensors" in verdict["parity.onnx"].detail


def test_nan_in_the_output_fails(tmp_path: Path) -> None:
    def poison(model: onnx.ModelProto) -> None:
        bias = initializer(model, "fc.bias")
        bias.CopyFrom(numpy_helper.from_array(np.asarray([0, 0, np.nan, 0, 0, 0], np.float32), "fc.bias"))

    verdict = judge(make_twin(), tmp_path, poison)
    assert failed(verdict) == ["pattern", "repeatable", "parity.onnx", "parity.onnx-default", "agreement"]
    assert "ONNX Runtime: output 'output' has 4 NaN or infinite values of 24" in verdict["repeatable"].detail
    assert "8 NaN or infinite values of 48" in verdict["parity.onnx"].detail
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing"])
def test_a_file_that_is_no_onnx_fails_every_check_that_reads_it(damage: str, tmp_path: Path) -> None:
    twin = make_twin()
    path = twin.write(tmp_path / "m.onnx")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"hello" if damage == "text" else b"")
    golden = twin.golden(tmp_path / "g.safetensors")
    verdict = verify_model(path, codes=twin.codes, model=twin.model(), golden=golden)
    assert failed(verdict) == [
        "pattern", "codes", "repeatable", "parity.onnx", "parity.onnx-default", "agreement"
    ]  # fmt: skip
    assert all("\n" not in check.detail and len(check.detail) < 400 for check in verdict.checks)


def test_a_truncated_codes_file_fails_codes_and_leaves_the_pattern_undeclared(tmp_path: Path) -> None:
    twin = make_twin()
    codes = tmp_path / "codes.safetensors"
    save_codes(codes, twin.codes)
    path = twin.write(tmp_path / "m.onnx")
    assert verify_model(path, codes=codes)["codes"].status == "pass"
    codes.write_bytes(codes.read_bytes()[:-1])
    verdict = verify_model(path, codes=codes)
    assert failed(verdict) == ["codes"]
    assert verdict["pattern"].status == "not checked"
    assert "codes.safetensors" in verdict["pattern"].detail


def test_a_model_that_does_not_load_fails_what_needs_it_and_golden_outputs_stand_in(tmp_path: Path) -> None:
    twin = make_twin()

    def load() -> torch.nn.Module:
        raise ValueError("tensor 'fc.bias' is cut off")

    golden = twin.golden(tmp_path / "g.safetensors")
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, model=load, golden=golden)
    assert failed(verdict) == ["codes", "repeatable", "parity.folded", "parity.onnx", "agreement"]
    for name in failed(verdict):
        assert "fc.bias" in verdict[name].detail
    assert "relative" in verdict["parity.onnx"].figures


def test_without_anything_to_compare_with_nothing_passes(tmp_path: Path) -> None:
    verdict = verify_model(make_twin().write(tmp_path / "m.onnx"))
    assert verdict.verdict == "fail"
    assert {check.status for check in verdict.checks} == {"not checked"}
    assert all(check.detail for check in verdict.checks)
    broken = verify_model(make_twin().write(tmp_path / "n.onnx", set_scale("conv1.weight", -1.0)))
    assert failed(broken) == ["pattern"]  # a law needs no declaration


def test_an_uncompressed_model_proves_nothing_about_codes(tmp_path: Path) -> None:
    twin = make_twin()
    all_float = {name: replace(coded) for name, coded in twin.codes.items()}

    def leave_all(model: onnx.ModelProto) -> None:
        for name in all_float:
            dequantize = node(model, f"{name}.dq")
            model.graph.initializer.append(numpy_helper.from_array(all_float[name].dequantize(), name))
            model.graph.node.remove(dequantize)

    verdict = verify_model(twin.write(tmp_path / "m.onnx", leave_all), codes={}, model=twin.model())
    names = ("pattern", "codes", "parity.onnx")
    assert [verdict[name].status for name in names] == ["not checked", "not checked", "pass"]
    assert failed(verify_model(twin.write(tmp_path / "m.onnx"), codes={})) == ["codes"]  # codes that nobody trained


def test_random_inputs_stand_in_for_golden_ones(tmp_path: Path) -> None:
    twin = make_twin()
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, model=twin.model())
    assert verdict["parity.onnx"].status == "pass"
    assert verdict["parity.onnx"].figures["samples"] == 8


def test_further_samples_are_run_too(tmp_path: Path) -> None:
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors")
    more = [{"input": np.ones((3, CHANNELS, SIDE, SIDE), np.float32)}]
    path = twin.write(tmp_path / "m.onnx")
    verdict = verify_model(path, codes=twin.codes, model=twin.model(), golden=golden, samples=more)
    assert verdict["parity.onnx"].status == "pass"
    assert verdict["parity.onnx"].figures["samples"] == 8


def test_the_same_files_give_the_same_verdict_and_the_events_follow(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    twin = make_twin()
    golden = twin.golden(tmp_path / "g.safetensors")
    path = twin.write(tmp_path / "m.onnx")
    first, second = (
        verify_model(path, codes=twin.codes, model=twin.model(), golden=golden, events=Events(listeners=[told.append]))
        for _ in range(2)
    )
    assert first.to_json() == second.to_json()
    assert [event["name"] for event in told if event["kind"] == "check"] == NAMES * 2
    shares = [event["done"] / event["total"] for event in told[: len(told) // 2] if event["kind"] == "progress"]
    assert shares == sorted(shares) and shares[-1] == 1


def test_the_twin_is_what_it_says() -> None:
    codes = make_codes()
    assert all(np.count_nonzero(codes[f"conv{i}.weight"].codes[:, :4], axis=1).max() == 2 for i in (1, 2))
    assert HIDDEN % BLOCK == 0
