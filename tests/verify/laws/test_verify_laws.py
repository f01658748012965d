"""Laws 1 to 5 on every file of a run: each law broken in each of them is found, and what was examined is counted."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from verify_twins import Twin, initializer, make_twin

from slope_compile.artifacts import RunFolder
from slope_compile.codes_file import HEADER_KEY, StoredCodes, save_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.qdq.reader import coded_weights, iter_weights
from slope_compile.verify.laws.check import Declared, check_codes, check_pattern
from slope_compile.verify.laws.digests import check_digests, digests_of
from slope_compile.verify.laws.files import Artifacts
from slope_compile.verify.verdict import Check, Once, attempt

Edit = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Run:
    """Files of the twin: exported, placed, codes, checkpoint."""

    folder: Path
    twin: Twin

    @property
    def files(self) -> Artifacts:
        return Artifacts.of(self.folder / "model.onnx", self.folder / "placed.onnx", self.folder / "codes.safetensors")

    def pattern(self) -> Check:
        codes = Once[Any](lambda: StoredCodes(self.folder / "codes.safetensors"))
        return check_pattern(lambda: iter_weights(self.files.onnx), codes, None, self.files)

    def codes(self) -> Check:
        codes = Once[Any](lambda: StoredCodes(self.folder / "codes.safetensors"))
        return attempt("codes", lambda: check_codes(lambda: iter_weights(self.files.onnx), codes, None))

    def edit_tensors(self, name: str, edit: Edit) -> None:
        from safetensors import safe_open

        path = self.folder / name
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        tensors = {key: value.copy() for key, value in load_file(path).items()}
        edit(tensors)
        save_file(tensors, path, metadata)

    def edit_onnx(self, name: str, tensor: str, edit: Callable[[Any], Any]) -> None:
        model = onnx.load(self.folder / name)
        found = initializer(model, tensor)
        array = numpy_helper.to_array(found).copy()
        edit(array)
        found.CopyFrom(numpy_helper.from_array(array, tensor))
        onnx.save(model, self.folder / name)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    twin = make_twin()
    twin.write(tmp_path / "model.onnx")
    twin.write(tmp_path / "placed.onnx")
    save_codes(tmp_path / "codes.safetensors", twin.codes)
    checkpoint = {
        "fc.bias": twin.bias, "bn.running_mean": np.zeros(4, np.float32), "bn.running_var": np.ones(4, np.float32),
        "mask": np.array([[0, -np.inf], [0, 0]], np.float32), "bn.num_batches_tracked": np.array(3),
    }  # fmt: skip
    save_file(checkpoint, tmp_path / "checkpoint.safetensors")
    return Run(tmp_path, twin)


def test_what_is_right_passes_and_is_counted(run: Run) -> None:
    check = run.pattern()
    assert check.status == "pass", check.detail
    weights, floats = {"tensors": 3, "elements": 1024}, {"tensors": 4, "elements": 27}
    assert check.figures["files"] == {
        "model.onnx": {"weights": weights, "floats": floats},
        "placed.onnx": {"weights": weights, "floats": floats},
        "codes.safetensors": {"codes": weights},
        "checkpoint.safetensors": {"floats": {"tensors": 4, "elements": 18}},
    }
    assert "so are placed.onnx, codes.safetensors, checkpoint.safetensors" in check.detail


def put(name: str, value: float) -> Edit:
    return lambda tensors: tensors[name].reshape(-1).__setitem__(3, value)


CODES = [
    (put("conv2.weight.codes", 100), "outside the 4-bit range"),
    (put("conv2.weight.scale", 0), "not finite and positive"),
    (put("conv2.weight.scale", -1), "not finite and positive"),
    (put("conv2.weight.scale", np.nan), "not finite and positive"),
    (put("conv2.weight.scale", np.inf), "not finite and positive"),
    (lambda t: t["conv2.weight.codes"].fill(1), "nonzeros in a group of the 2:4 pattern"),
    (lambda t: t.update({"more": np.ones(3, np.int8)}), "a tensor that its header does not describe"),
    (lambda t: t.update({"conv2.weight.codes": t["conv2.weight.codes"].astype(np.int16)}), "not int8 and float32"),
    (lambda t: t.update({"conv2.weight.scale": np.ones(2, np.float32)}), "do not fit axis"),
    (lambda t: t.pop("conv2.weight.scale"), "conv2.weight.scale"),
]


@pytest.mark.parametrize(("edit", "said"), CODES)
def test_a_law_broken_in_the_codes_alone(run: Run, edit: Edit, said: str) -> None:
    run.edit_tensors("codes.safetensors", edit)
    check = run.pattern()
    assert check.status == "fail"
    assert "codes.safetensors: " in check.detail and said in check.detail
    assert run.codes().status == ("pass" if "more" in said or "describe" in said else "fail")


CHECKPOINT = [
    (put("fc.bias", np.nan), "fc.bias: finite: 1 of 6"),
    (put("fc.bias", np.inf), "fc.bias: finite: 1 of 6"),
    (put("bn.running_mean", -np.inf), "bn.running_mean: finite"),
    (put("bn.running_var", -1e-3), "bn.running_var: variance: 1 of 4 are below 0"),
    (put("bn.running_var", np.nan), "bn.running_var: finite"),
    (put("mask", np.nan), "mask: finite"),
    (lambda t: t.update(mask=np.array([1, np.inf], np.float32)), "mask: finite"),
    (lambda t: t.update(half=np.array([1, np.nan], np.float16)), "half: finite"),
]


@pytest.mark.parametrize(("edit", "said"), CHECKPOINT)
def test_a_law_broken_in_the_checkpoint_alone(run: Run, edit: Edit, said: str) -> None:
    run.edit_tensors("checkpoint.safetensors", edit)
    check = run.pattern()
    assert check.status == "fail" and f"checkpoint.safetensors: {said}" in check.detail


@pytest.mark.parametrize("name", ["model.onnx", "placed.onnx"])
@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        ("fc.bias", np.nan, "fc.bias: finite"),
        ("fc.bias", -np.inf, "fc.bias: finite"),
        ("conv1.weight.scale", 0, "scale"),
        ("conv1.weight.scale", np.nan, "scale"),
        ("conv2.weight.codes", None, "groups of 4 have over 2 nonzeros"),
    ],
)
def test_a_law_broken_in_an_onnx_file_alone(run: Run, name: str, tensor: str, value: float | None, said: str) -> None:
    edit = (lambda a: a.fill(1)) if value is None else (lambda a: a.reshape(-1).__setitem__(2, value))
    run.edit_onnx(name, tensor, edit)
    check = run.pattern()
    assert check.status == "fail" and said in check.detail
    assert ("placed.onnx: " in check.detail) == (name == "placed.onnx")


@pytest.mark.parametrize("name", ["codes.safetensors", "checkpoint.safetensors", "placed.onnx"])
@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_file_that_cannot_be_read(run: Run, name: str, damage: str) -> None:
    path = run.folder / name
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"hello", "cut": data[: len(data) // 2]}[damage])
    check = run.pattern()
    # What is wrong with the codes is for `codes` to say: nothing else declares bits and pattern.
    assert check.status == ("not checked" if name == "codes.safetensors" else "fail")
    assert name in check.detail
    assert run.codes().status == ("fail" if name == "codes.safetensors" else "pass")


def norm(variance: float) -> onnx.ModelProto:
    names = ("scale", "bias", "mean", "variance")
    tensors = [numpy_helper.from_array(np.ones(2, np.float32) * (variance if n == "variance" else 1), n) for n in names]
    tensors.append(numpy_helper.from_array(np.array([0, -np.inf], np.float32), "mask"))
    nodes = [
        helper.make_node("BatchNormalization", ["x", *names], ["n"], "bn"),
        helper.make_node("Add", ["n", "mask"], ["y"], "masked"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors))


@pytest.mark.parametrize(
    ("variance", "said"), [(1.0, ""), (0.0, ""), (-1.0, "variance: 2 of 2 are below 0"), (np.inf, "finite: 2 of 2")]
)
def test_a_norm_and_a_mask(tmp_path: Path, variance: float, said: str) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(norm(variance), path)
    check = check_pattern(lambda: iter_weights(path), None, None, Artifacts(path))
    assert check.status == ("fail" if said else "not checked")
    assert said in check.detail and "mask" not in check.detail


@pytest.mark.parametrize(
    ("step", "zero", "said"),
    [(0.1, 0, ""), (0.0, 0, "step"), (np.nan, 0, "step"), (-1.0, 0, "step"), (np.inf, 0, "step"), (0.1, 3, "zero")],
)
def test_steps_of_activations(tmp_path: Path, step: float, zero: int, said: str) -> None:
    tensors = [
        numpy_helper.from_array(np.float32(step), "s"), numpy_helper.from_array(np.int8(zero), "z"),
    ]  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2]) for name in "xy"]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors)), path)
    check = check_pattern(lambda: iter_weights(path), None, None, Artifacts(path))
    assert check.status == ("fail" if said else "not checked") and said in check.detail
    assert check.figures["files"]["m.onnx"]["quantizers"] == 2


def test_sparse_floats_of_a_placed_file(run: Run) -> None:
    """`sparse-fp16`: constants with the zeros in place of codes."""
    model = onnx.load(run.folder / "placed.onnx")
    weight = next(one for one in coded_weights(run.files.onnx) if one.name == "conv2.weight")
    values = weight.values().astype(np.float16)
    graph = model.graph
    kept = [node for node in graph.node if node.output[0] != "conv2.weight"]
    del graph.node[:]
    cast = helper.make_node("Cast", ["conv2.weight"], ["conv2.cast"], to=TensorProto.FLOAT)
    graph.node.extend([cast, *kept])
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "conv2.weight" and node.op_type == "Conv":
                node.input[index] = "conv2.cast"
    graph.initializer.append(numpy_helper.from_array(values, "conv2.weight"))
    onnx.save(model, run.folder / "placed.onnx")
    assert run.pattern().status == "pass"
    run.edit_onnx("placed.onnx", "conv2.weight", lambda a: a.fill(1))
    check = run.pattern()
    assert check.status == "fail" and "placed.onnx: conv2.weight: pattern" in check.detail


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Two bytes a code: the file's and the checkpoint's; blocks beside them."""
    shape, layers = (1024, 2048), 12
    codes = np.tile(np.array([1, 0, -2, 0], np.int8), (shape[0], shape[1] // 4))
    scale = np.ones(shape[0], np.float32)
    nodes, tensors = [], []
    for index in range(layers):
        name = f"w{index}"
        tensors += [numpy_helper.from_array(codes, f"{name}.codes"), numpy_helper.from_array(scale, f"{name}.scale")]
        dequantize = helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [name], axis=0)
        nodes += [dequantize, helper.make_node("Gemm", ["x", name], [f"y{index}"], transB=1)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 2048]) for name in ("x", "y0")]
    path, stored = tmp_path / "m.onnx", tmp_path / "codes.safetensors"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors)), path)
    save_codes(stored, {f"w{i}": CodedTensor(codes, scale, 4, 0, (2, 4)) for i in range(layers)})
    del tensors, nodes
    tracemalloc.start()
    try:
        expected = Once[Any](lambda: StoredCodes(stored))
        pattern = check_pattern(lambda: iter_weights(path), expected, None, Artifacts.of(path, None, stored))
        equal = check_codes(lambda: iter_weights(path), expected, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (pattern.status, equal.status) == ("pass", "pass")
    assert peak < 2 * codes.nbytes + 3e6 < layers * codes.nbytes / 2


def test_declared_by_a_layer_list(run: Run) -> None:
    declared = {name: Declared(coded.bits, coded.pattern) for name, coded in run.twin.codes.items()}

    def check(layers: Mapping[str, Declared]) -> Check:
        return check_pattern(lambda: iter_weights(run.files.onnx), None, Once(lambda: layers))

    assert check(declared).status == "pass"
    assert "conv2.weight: pattern" in check(declared | {"conv2.weight": Declared(4, (1, 4))}).detail
    assert "conv2.weight: range" in check(declared | {"conv2.weight": Declared(2, (2, 4))}).detail
    assert "absent: name" in check(declared | {"absent": Declared(4, None)}).detail


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "run")
    partial = found.fresh_partial("export")
    (partial / "layers.json").write_text("{}")
    array = numpy_helper.from_array(np.ones(2000, np.float32), "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2000]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", values[:1], values[1:], [array])
    onnx.save(helper.make_model(graph), partial / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    found.commit("export", {}, {})
    return found


def test_digests_of_a_stage(folder: RunFolder) -> None:
    check = check_digests(digests_of(folder, ("export", "build/a100")))
    assert (check.status, check.figures) == ("pass", {"files": 3, "mismatches": [], "not_listed": []})


@pytest.mark.parametrize("name", ["other.onnx", "stray.data", "more/model.safetensors", "model.engine"])
def test_an_artifact_that_nobody_lists_fails(folder: RunFolder, name: str) -> None:
    path = folder.stage_path("export") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"anything")
    check = check_digests(digests_of(folder, ("export",)))
    assert check.status == "fail" and f"export/{name} is not in the manifest" in check.detail


def test_a_note_that_nobody_lists_is_told(folder: RunFolder) -> None:
    (folder.stage_path("export") / "note.txt").write_text("hello")
    (folder.stage_path("export") / "build.log").write_text("times")
    check = check_digests(digests_of(folder, ("export",)))
    assert check.status == "pass" and check.figures["not_listed"] == ["export/note.txt"]
    assert "not examined: export/note.txt" in check.detail


def test_external_data_whose_entry_was_taken_away_fails(folder: RunFolder) -> None:
    manifest = folder.path / "manifest.json"
    document = json.loads(manifest.read_text())
    del document["stages"]["export"]["outputs"]["export/model.onnx.data"]
    manifest.write_text(json.dumps(document))
    check = check_digests(digests_of(RunFolder(folder.path), ("export",)))
    assert check.status == "fail" and "keeps tensors in model.onnx.data" in check.detail


def test_codes_in_a_file_are_read_when_asked_for(tmp_path: Path) -> None:
    twin, path = make_twin(), tmp_path / "codes.safetensors"
    save_codes(path, twin.codes)
    stored = StoredCodes(path)
    assert list(stored) == sorted(twin.codes) and len(stored) == 3
    assert stored.size("conv1.weight") == 576 and stored.pattern("conv2.weight") == (2, 4)
    for name, coded in twin.codes.items():
        found = stored[name]
        assert np.array_equal(found.codes, coded.codes) and np.array_equal(found.scale, coded.scale)
        assert replace(found, codes=0, scale=0) is not found and (found.bits, found.axis) == (coded.bits, coded.axis)
    with pytest.raises(KeyError):
        stored["absent"]
    assert HEADER_KEY == "coded_tensors"
