"""The search itself: what it looks at, what it holds, and what it writes."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from bisect_nets import LAYERS, Exported, change, producer
from onnx import helper, numpy_helper
from onnx_nets import coded, save
from polygraphy.comparator import RunResults
from polygraphy.json import load_json

from slope_compile.placement.passes.precision import SetPrecision
from slope_compile.qdq.reader import coded_weights
from slope_compile.verify.bisect import OnnxSide, TorchSide, engine_note, explain, layer_errors
from slope_compile.verify.bisect.distance import relative_error
from slope_compile.verify.bisect.points import Key, groups
from slope_compile.verify.bisect.reproducer import clear_reproducers, write_reproducer
from slope_compile.verify.bisect.search import bisect, common_points, locally
from slope_compile.verify.chain.runners import Array, Arrays
from slope_compile.verify.parity.allowed import half_tensors
from slope_compile.verify.parity.tolerance import Tolerance, in_half, tolerance_of
from slope_compile.verify.verdict import NotCheckedError

# Polygraphy's command, but for torch, which it looks for and does not need: loading it takes longer than all the rest.
POLYGRAPHY = """
import sys
class Hidden:
    def find_spec(self, name, *rest):
        if name == "torch":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
from polygraphy.tools import main
sys.exit(main())
"""


class Counted(OnnxSide):
    """Counts its runs, and the bytes that each of them returns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held: list[int] = []

    def values(self, feed: Arrays, keys: Iterable[Key]) -> dict[Key, Array]:
        found = super().values(feed, keys)
        self.held.append(sum(array.nbytes for array in found.values()))
        return found


@pytest.mark.parametrize("seed", range(10))
def test_a_random_change_of_one_layer_is_found_there(seed: int, mini: Exported, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    layer = LAYERS[seed % len(LAYERS)]

    def damage(array: Any) -> Any:
        at = tuple(rng.integers(0, size) for size in array.shape)
        array[at] = array[at] + (1 if array[at] <= 0 else -1) if array.dtype.kind == "i" else array[at] * 1.01
        return array

    what = ("weight.codes", "weight.scale")[seed // len(LAYERS) % 2]
    found = mini.explain(tmp_path, change(f"{layer}.{what}", damage))
    assert found is not None
    assert found.layer == layer, str(found)
    assert found.cause.startswith("weight: "), found.cause


def test_the_first_of_two_damaged_layers_is_named_also_where_its_error_hides(tmp_path: Path) -> None:
    """A Relu swallows the first error at that sample; a second layer shows one: the first is still to blame."""
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    names = ["a", "b", "c"]
    nodes = []
    value = "x"
    for name in names:
        nodes += [
            helper.make_node("Gemm", [value, f"{name}.weight", f"{name}.bias"], [f"{name}.out"], name, transB=1),
            helper.make_node("Relu", [f"{name}.out"], [f"{name}.relu"], f"{name}.relu"),
        ]
        value = f"{name}.relu"
    stored = [numpy_helper.from_array(eye, f"{name}.weight") for name in names]
    stored += [numpy_helper.from_array(zero, f"{name}.bias") for name in names]
    right = save(tmp_path / "right.onnx", nodes, stored, ["batch", 4], value)
    model = onnx.load(right)
    for name, at in (("a", 0), ("c", 1)):
        tensor = next(one for one in model.graph.initializer if one.name == f"{name}.weight")
        changed = eye.copy()
        changed[at, at] = 3
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    wrong = tmp_path / "wrong.onnx"
    wrong.write_bytes(model.SerializeToString())
    feed = {"x": np.asarray([[-1, 1, 1, 1]], np.float32)}  # channel 0 is negative: a's error ends in its Relu
    found = explain("parity.placed", OnnxSide(right), OnnxSide(wrong), feed, Tolerance(1e-6, ""), None)
    assert found is not None and found.layer == "a"
    keys = common_points(OnnxSide(right), OnnxSide(wrong), feed).keys
    end = keys[bisect(OnnxSide(right), OnnxSide(wrong), feed, keys, 1e-6)]
    assert end.name in ("a", "c")  # what bisecting alone ends in is not to be relied on


def test_bisecting_takes_log_n_runs_of_one_tensor_each(mini: Exported, tmp_path: Path) -> None:
    wrong = mini.damaged(tmp_path, change("wide.weight.scale", lambda a: a * 2))
    reference, tested = Counted(mini.path), Counted(wrong)
    points = common_points(reference, tested, mini.feed)
    end = bisect(reference, tested, mini.feed, points.keys, 1e-5)
    assert points.keys[end].name == "wide"
    assert len(reference.held) == len(tested.held) <= 1 + int(np.ceil(np.log2(len(points.keys))))
    largest = max(size for size in points.sizes if size is not None)
    assert max(reference.held) <= largest


def test_no_more_than_the_budget_is_held(mini: Exported, tmp_path: Path) -> None:
    wrong = mini.damaged(tmp_path, change("head.weight.scale", lambda a: a * 2))
    reference = Counted(mini.path)
    points = common_points(reference, OnnxSide(wrong), mini.feed)
    largest = max(size for size in points.sizes if size is not None)
    found = list(locally(reference, OnnxSide(wrong), mini.feed, points, budget=4 * largest))
    assert [local.key.name for local in found if not local.within] == ["head"]
    assert len(reference.held) > 3
    assert max(reference.held) <= 4 * largest  # a group, and what it is computed from
    whole = explain("c", OnnxSide(mini.path), OnnxSide(wrong), mini.feed, mini.allowed, None)
    assert explain("c", OnnxSide(mini.path), OnnxSide(wrong), mini.feed, mini.allowed, None, budget=1) == whole


def test_groups_of_tensors_fit_the_budget() -> None:
    assert groups([], 10) == []
    assert groups([4, 4, 4], 8) == [range(2), range(2, 3)]
    assert groups([100, 1, 1], 8) == [range(1), range(1, 3)]
    assert groups([None] * 5, 8) == [range(4), range(4, 5)]


def test_each_layers_error_is_within_what_floats_allow(mini: Exported, tmp_path: Path) -> None:
    rows = layer_errors(TorchSide(mini.folded), OnnxSide(mini.path), mini.feed, mini.allowed)
    assert [row.name for row in rows] == LAYERS
    assert [row.operator for row in rows] == ["Conv", "Conv", "MatMul", "MatMul", "Gemm"]
    assert all(0 <= row.relative <= row.allowed <= mini.allowed.relative for row in rows)
    assert rows[-1].allowed == mini.allowed.relative
    assert rows == layer_errors(TorchSide(mini.folded), OnnxSide(mini.path), mini.feed, mini.allowed, budget=1)
    wrong = OnnxSide(mini.damaged(tmp_path, change("proj.weight.scale", lambda a: a * 2)))
    far = [row.relative > row.allowed for row in layer_errors(OnnxSide(mini.path), wrong, mini.feed, mini.allowed)]
    assert far == [False, False, True, True, True]
    same = layer_errors(TorchSide(mini.model), TorchSide(mini.folded), mini.feed, mini.allowed)
    assert (same[0].name, same[0].operator, same[0].relative) == ("conv1", "Conv2d", 0.0)
    assert len(same) == len(LAYERS)


@pytest.mark.parametrize("layer", ["conv2", "proj"])
def test_a_layer_of_the_folded_model_that_differs_is_named(layer: str, mini: Exported, tmp_path: Path) -> None:
    sides = TorchSide(mini.model), TorchSide(mini.folded)
    assert explain("parity.folded", *sides, mini.feed, mini.allowed, None) is None
    weight = mini.folded.get_parameter(f"{layer}.weight").data
    weight[3] *= 2
    try:
        found = explain("parity.folded", *sides, mini.feed, mini.allowed, tmp_path)
    finally:
        weight[3] /= 2
    assert found is not None and found.layer == layer
    assert found.cause == "weight: scale off by a power of two: x 2, in output channel 3"
    assert found.reproducer is not None
    folder = tmp_path / found.reproducer.folder
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    (given,) = load_json(str(folder / "inputs.json"))
    (again,) = OnnxSide(folder / "model.onnx").results(given)
    ((_, (expected,)),) = RunResults.load(str(folder / "outputs.json"))
    assert 0.1 < relative_error(expected["output"], again) == pytest.approx(found.error, rel=1e-3)


def replay(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    assert program == "polygraphy"
    whole = [sys.executable, "-c", POLYGRAPHY, *arguments]
    return subprocess.run(whole, cwd=folder, capture_output=True, text=True, check=False)


def test_polygraphy_replays_the_layer_alone(mini: Exported, tmp_path: Path) -> None:
    found = mini.explain(tmp_path, change("conv2.weight.scale", lambda a: a * 2), tmp_path / "out")
    assert found is not None and found.reproducer is not None
    assert found.reproducer.folder == "reproducer/parity.onnx"
    folder = tmp_path / "out" / found.reproducer.folder
    assert (folder / "command.txt").read_text() == found.reproducer.command + "\n"
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["DequantizeLinear", "Conv"]
    assert sorted(tensor.name for tensor in model.graph.initializer) == ["conv2.weight.codes", "conv2.weight.scale"]
    failed = replay(folder, found.reproducer.command)
    assert failed.returncode == 1, failed.stderr
    assert "FAILED" in failed.stdout
    repaired = onnx.load(mini.path)
    right = next(tensor for tensor in repaired.graph.initializer if tensor.name == "conv2.weight.scale")
    next(tensor for tensor in model.graph.initializer if tensor.name == right.name).CopyFrom(right)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    assert replay(folder, found.reproducer.command).returncode == 0


@pytest.mark.parametrize("container", ["INT2", "INT4", "INT8", "FLOAT"])
def test_a_reproducer_holds_its_constants_wherever_they_were(container: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-2, 2, (8, 4, 3, 3))
    tensors, dequantize = coded("c.weight", codes, np.full(8, 0.5), container, axis=0)
    conv = helper.make_node("Conv", ["x", "c.weight"], ["c"], name="c")
    nodes = [dequantize, conv]
    if container == "FLOAT":
        tensors, nodes = [numpy_helper.from_array(codes.astype(np.float32), "c.weight")], [conv]
    opset = 25 if container == "INT2" else 21
    path = save(tmp_path / "m.onnx", nodes, tensors, ["batch", 4, 5, 5], "c", opset)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    side = OnnxSide(path)
    feed = {"x": rng.standard_normal((2, 4, 5, 5), dtype=np.float32)}
    points = common_points(side, side, feed)
    (local,) = locally(side, side, feed, points)
    written = write_reproducer(tmp_path, "parity.onnx", side, side, feed, points, local)
    folder = tmp_path / written.folder
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    again = OnnxSide(folder / "model.onnx")
    np.testing.assert_array_equal(again.results(feed | {})[0], local.reference)
    assert not (folder / "m.data").exists()


def test_reproducers_of_an_earlier_verification_go_and_other_files_stay(tmp_path: Path) -> None:
    for check, name in (("parity.onnx", "model.onnx"), ("parity.onnx", "command.txt"), ("parity.placed", "notes.md")):
        (tmp_path / "reproducer" / check).mkdir(parents=True, exist_ok=True)
        (tmp_path / "reproducer" / check / name).write_text("x")
    clear_reproducers(tmp_path, ["parity.onnx", "parity.placed", "parity.folded"])
    assert [path.name for path in (tmp_path / "reproducer").rglob("*")] == ["parity.placed", "notes.md"]
    (tmp_path / "reproducer" / "parity.placed" / "notes.md").unlink()
    clear_reproducers(tmp_path, ["parity.placed"])
    assert list(tmp_path.iterdir()) == []


def test_a_fusion_of_onnx_runtime_is_told_as_that(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors, dequantize = coded(
        "f.weight", rng.integers(-7, 8, (64, 32)), rng.uniform(0.05, 0.1, (2, 32)), "INT4", axis=0, block_size=32
    )
    nodes = [dequantize, helper.make_node("MatMul", ["x", "f.weight"], ["y"], name="f")]
    path = save(tmp_path / "m.onnx", nodes, tensors, ["batch", 64], "y")
    feed = {"x": rng.standard_normal((4, 64), dtype=np.float32)}
    allowed = tolerance_of(coded_weights(path))
    found = explain("parity.onnx-default", OnnxSide(path), OnnxSide(path, optimized=True), feed, allowed, tmp_path)
    assert found is not None and found.layer == "f"
    assert found.cause.startswith("fused at lower precision by ONNX Runtime's optimizer")
    assert found.reproducer is not None and "ORT_ENABLE_ALL" in found.reproducer.command


class Fuses(OnnxSide):
    """An optimizer that computes otherwise as long as nothing is marked."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, optimized=True)

    def results(self, feed: Arrays) -> list[Array]:
        return [array * np.float32(1.01) for array in super().results(feed)]


def test_a_difference_that_marking_takes_away_is_a_finding(mini: Exported) -> None:
    found = explain(
        "parity.onnx-default",
        OnnxSide(mini.path),
        Fuses(mini.path),
        mini.feed,
        mini.allowed,
        None,
    )
    assert found is not None and found.layer == ""
    assert "the difference vanishes when the layers' outputs are marked" in str(found)
    assert found.figures()["reproducer"] is None


def test_an_engine_is_not_looked_into_but_how_to_is_said(tmp_path: Path) -> None:
    note = engine_note(tmp_path / "placed.onnx", 1e-3)
    assert note.startswith("which layer differs was not checked")
    command = next(part for part in note.split(": ") if part.startswith("polygraphy ")).partition(";")[0]
    answer = replay(tmp_path, f"{command} --gen-script script.py")
    assert answer.returncode == 0, answer.stderr
    assert "MARK_ALL" in (tmp_path / "script.py").read_text()


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_file_that_cannot_be_read_is_a_reason_not_a_traceback(damage: str, mini: Exported, tmp_path: Path) -> None:
    path = mini.damaged(tmp_path, lambda model: None)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        path.unlink()
    with pytest.raises(NotCheckedError, match=r"cannot be told: .*damaged.onnx"):
        explain("parity.onnx", TorchSide(mini.folded), OnnxSide(path), mini.feed, mini.allowed, None)


def test_what_onnx_runtime_cannot_compute_is_the_place(mini: Exported, tmp_path: Path) -> None:
    found = mini.explain(tmp_path, change("bn2.weight", lambda a: a[:-1]), tmp_path)
    assert found is not None and found.layer == "bn2"
    assert found.cause == "weight: of shape [15], expected [16]"

    found = mini.explain(tmp_path, change("val_40", lambda a: a - 1), tmp_path)
    assert found is not None and found.layer == "between bn2, the input of conv2 and the input of norm"
    assert "cannot be computed: " in found.cause and "Reshape" in found.cause
    assert found.tested["shape"] == [0]


def test_a_network_of_another_shape_is_told_from_its_first_layer(mini: Exported, tmp_path: Path) -> None:
    def wider(model: onnx.ModelProto) -> None:
        node = producer(model, "relu")
        node.op_type = "Concat"
        node.input.append(node.input[0])
        node.attribute.append(helper.make_attribute("axis", 1))

    found = mini.explain(tmp_path, wider)
    assert found is not None
    assert found.layer == "node_relu"
    assert "of shape [1, 32, 8, 8], expected [1, 16, 8, 8]" in found.cause
    assert found.error == float("inf")


def test_shared_and_repeated_layers_are_compared_call_by_call(tmp_path: Path) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.b(torch.relu(self.a(torch.relu(self.a(x)))))
            return answer

    torch.manual_seed(0)
    model = Twice()
    weight = model.a.weight.detach().numpy()
    nodes = []
    value = "x"
    for index in range(3):
        nodes.append(helper.make_node("MatMul", [value, "a.weight"], [f"m{index}"], f"m{index}"))
        value = f"m{index}"
        if index < 2:
            nodes.append(helper.make_node("Relu", [value], [f"r{index}"], f"r{index}"))
            value = f"r{index}"
    stored = [numpy_helper.from_array(np.ascontiguousarray(weight.T), "a.weight")]
    feed = {"x": np.random.default_rng(0).standard_normal((2, 4), dtype=np.float32)}
    path = save(tmp_path / "m.onnx", nodes, stored, ["batch", 4], value)
    keys = common_points(TorchSide(model), OnnxSide(path), feed).keys
    assert [key.call for key in keys if key.role == "product"] == [0, 1, 2]
    assert explain("c", TorchSide(model), OnnxSide(path), feed, Tolerance(1e-6, ""), None) is None
    nodes[2].op_type = "Add"
    nodes[2].input[1] = "one"
    stored.append(numpy_helper.from_array(np.ones(4, np.float32), "one"))
    path = save(tmp_path / "w.onnx", nodes, stored, ["batch", 4], value)
    found = explain("c", TorchSide(model), OnnxSide(path), feed, Tolerance(1e-6, ""), None)
    assert found is not None  # one call is gone: which calls are which is not guessed
    assert "Add" in found.operator


def test_a_fixed_batch_is_run_whole(mini: Exported, tmp_path: Path) -> None:
    def fix(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
        change("conv1.weight.scale", lambda a: a * 2)(model)

    found = mini.explain(tmp_path, fix)
    assert found is not None and found.layer == "conv1"
    assert found.reference["shape"][0] == 3


def test_half_precision_is_allowed_for_and_its_faults_are_found(mini: Exported, tmp_path: Path) -> None:
    model = ir.load(mini.path)
    SetPrecision("fp16")(model)
    proto = ir.to_proto(model)
    placed = tmp_path / "placed.onnx"
    placed.write_bytes(proto.SerializeToString())
    precision, tensors = half_tensors(placed)
    allowed = in_half(mini.allowed, tensors, precision)
    reference = OnnxSide(mini.path)
    assert explain("parity.placed", reference, OnnxSide(placed), mini.feed, allowed, None) is None
    rows = layer_errors(reference, OnnxSide(placed), mini.feed, allowed)
    assert [row.name for row in rows] == LAYERS
    assert all(mini.allowed.relative < row.relative <= row.allowed for row in rows)
    change("proj.weight.scale", lambda a: a * 2)(proto)
    placed.write_bytes(proto.SerializeToString())
    found = explain("parity.placed", reference, OnnxSide(placed), mini.feed, allowed, tmp_path)
    assert found is not None and found.layer == "proj"
    assert found.cause == "weight: scale off by a power of two: x 2, everywhere"
    onnx.checker.check_model(tmp_path / "reproducer" / "parity.placed" / "model.onnx", full_check=True)
