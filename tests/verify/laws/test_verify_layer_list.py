"""layers.json of an export is held against the codes, the ONNX file and the trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from prepared_runs import write_list
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from verify_twins import Twin, make_twin

from slope_compile.codes_file import StoredCodes, save_codes
from slope_compile.export.golden import write_golden
from slope_compile.qdq.reader import iter_weights
from slope_compile.verify.laws.check import check_codes
from slope_compile.verify.laws.layer_list import LayerList
from slope_compile.verify.single import verify_file
from slope_compile.verify.verdict import Check, Once, attempt

Edit = Callable[[Any], object]  # of a list, or of a model


def judged(path: Path, twin: Twin, edit: Edit | None = None, alone: bool = False) -> Check:
    """`codes` of a file and its list, the list edited."""
    file = twin.write(path / "m.onnx")
    listed = write_list(path / "layers.json", file, twin.codes)
    if edit is not None:
        told = json.loads(listed.read_text())
        edit(told)
        listed.write_text(json.dumps(told))
    return made(file, listed, twin, alone)


def made(file: Path, listed: Path, twin: Twin, alone: bool = False) -> Check:
    codes, model = (None, None) if alone else (Once(lambda: twin.codes), Once(twin.model))
    layers = LayerList(listed, file)
    return attempt("codes", lambda: check_codes(lambda: iter_weights(file), codes, model, None, layers))


def first(**given: Any) -> Edit:
    return lambda told: told["layers"][0].update(given)


def activations(bits: int) -> Edit:
    row = {"name": "a", "bits": bits, "scale": 1.0, "low": 0, "high": 127, "pairs": 1}
    return lambda told: told.update(activations=[row])


def widened(twin: Twin) -> Edit:
    """Conv1's codes in INT8."""

    def edit(model: onnx.ModelProto) -> None:
        stored = next(tensor for tensor in model.graph.initializer if tensor.name == "conv1.weight.codes")
        codes = np.asarray(twin.codes["conv1.weight"].codes)
        stored.CopyFrom(onnx.numpy_helper.from_array(codes, stored.name))

    return edit


def golden_of(twin: Twin, path: Path) -> None:
    """Samples that keep the weights' digests."""
    twin.golden(path)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    write_golden(path, tensors["inputs"], {"output": tensors["outputs"]}, twin.codes)


def test_a_list_that_says_what_is_so_passes(tmp_path: Path) -> None:
    assert judged(tmp_path, make_twin()).status == "pass"
    found = judged(tmp_path, make_twin(), alone=True)
    assert found.status == "not checked" and found.detail.endswith("layers.json agrees with the file")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (first(bits=8), "conv1.weight: layers.json: bits is 8, trained 4"),
        (first(pattern=None), "conv1.weight: layers.json: pattern is None, trained 2:4"),
        (first(bits=None, pattern=None), "conv1.weight: layers.json: bits is None, trained 4"),
        (first(shape=[8, 72]), "conv1.weight: layers.json: shape is [8, 72], trained [8, 8, 3, 3]"),
        (first(shape=[8, 8, 3]), "conv1.weight: layers.json: bytes.fp32 is 2304; [8, 8, 3] takes 768"),
        (first(density=0.25), "conv1.weight: layers.json: density is 0.25, counted 0.5"),
        (first(op="Gemm"), "conv1.weight: layers.json: op is Gemm, the file multiplies in a Conv"),
        (first(container="INT8"), "layers.json: int4-storage in INT8, 320 bytes; the file holds int4-storage in INT4"),
        (first(placement="sparse-int8"), "conv1.weight: layers.json: sparse-int8 in INT4"),
        (first(bytes={"fp32": 2304, "file": 1}), "layers.json: int4-storage in INT4, 1 bytes; the file holds"),
        (first(name="conv3.weight"), "json: has no row; conv3.weight: layers.json: a row for no layer of"),
        (lambda told: told["layers"].pop(), "fc.weight: layers.json: has no row"),
        (lambda told: told.update(layers=[]), "conv1.weight: layers.json: has no row"),
        (lambda told: told["layers"].append(told["layers"][0]), "conv1.weight: layers.json: has 2 rows"),
        (activations(8), "a: layers.json: activations: 8 bits: m.onnx does not quantize there"),
        (activations(9), "a: layers.json: activations: an activation of 9 bits"),
        (lambda told: told.pop("layers"), "layers.json cannot be read: layers: Field required"),
        (lambda told: told.update(layers=3), "layers: Input should be a valid list"),
        (first(bits="4"), "layers.0.bits: Input should be a valid integer"),
        (first(bits=True), "layers.0.bits: Input should be a valid integer"),
        (first(pattern="x"), "layers.0.pattern: "),
        (first(density=float("nan")), "layers.0.density is nan, which is no number of ours"),
        (first(bytes={"fp32": 10**400, "file": 1}), "layers.0.bytes.fp32 is an integer of"),
        (first(name="\ud800"), "layers.0.name is half a character"),
        (lambda told: told["layers"].append([]), "layers.3: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_a_list_that_says_anything_else_fails(tmp_path: Path, edit: Edit, words: str) -> None:
    found = judged(tmp_path, make_twin(), edit)
    assert found.status == "fail" and words in found.detail, found.detail


@pytest.mark.parametrize("data", [None, b"", b"[" * 100_000, b"\xff"], ids=["gone", "empty", "deep", "no text"])
def test_a_list_that_cannot_be_read_fails(tmp_path: Path, data: bytes | None) -> None:
    twin = make_twin()
    listed = tmp_path / "layers.json"
    if data is not None:
        listed.write_bytes(data)
    found = made(twin.write(tmp_path / "m.onnx"), listed, twin)
    assert found.status == "fail" and "layers.json: file: layers.json" in found.detail
    assert found.figures["failing"] == ["layers.json"]


def test_without_the_codes_the_file_itself_contradicts_a_list(tmp_path: Path) -> None:
    found = judged(tmp_path, make_twin(), lambda told: told["layers"].pop(), alone=True)
    assert found.status == "fail" and "fc.weight: layers.json: has no row" in found.detail
    assert found.figures["failing"] == ["fc.weight"]


def test_a_file_that_keeps_its_codes_in_another_way_keeps_its_list(tmp_path: Path) -> None:
    """Another tool wrote conv1's codes in INT8; fc is turned around. The list says how the export stored them."""
    twin = make_twin()
    (tmp_path / "x").mkdir()
    listed = write_list(tmp_path / "layers.json", twin.write(tmp_path / "m.onnx"), twin.codes)

    assert made(twin.write(tmp_path / "x" / "m.onnx", widened(twin)), listed, twin).status == "pass"


def test_a_lone_file_of_which_samples_keep_digests_may_keep_its_codes_in_another_way(
    tmp_path: Path,
) -> None:
    twin = make_twin()
    listed = write_list(tmp_path / "m.layers.json", twin.write(tmp_path / "m.onnx"), twin.codes)
    golden_of(twin, tmp_path / "m.golden.safetensors")
    twin.write(tmp_path / "m.onnx", widened(twin))
    found = verify_file(tmp_path / "m.onnx")["codes"]
    assert found.status == "pass", found.detail
    told = json.loads(listed.read_text())
    first(bits=8)(told)
    listed.write_text(json.dumps(told))
    assert "conv1.weight: m.layers.json: bits is 8, trained 4" in verify_file(tmp_path / "m.onnx")["codes"].detail


def test_a_lone_file_whose_list_is_short_fails(tmp_path: Path) -> None:
    twin = make_twin()
    file = twin.write(tmp_path / "m.onnx")
    listed = write_list(tmp_path / "m.layers.json", file, twin.codes)
    assert verify_file(file)["codes"].status == "not checked"
    told = json.loads(listed.read_text())
    listed.write_text(json.dumps({"layers": told["layers"][:-1]}))
    found = verify_file(file)["codes"]
    assert found.status == "fail" and "fc.weight: m.layers.json: has no row" in found.detail


def test_codes_that_break_a_law_do_not_hide_what_the_list_says(tmp_path: Path) -> None:
    twin = make_twin()
    file, path = twin.write(tmp_path / "m.onnx"), tmp_path / "codes.safetensors"
    listed = write_list(tmp_path / "layers.json", file, twin.codes)
    save_codes(path, twin.codes)
    tensors, told = load_file(path), json.loads(listed.read_text())
    with safe_open(path, "numpy") as opened:
        header = opened.metadata()
    tensors["fc.weight.scale"][0] = -1
    save_file(tensors, path, metadata=header)
    listed.write_text(json.dumps({"layers": [{**row, "container": "INT8"} for row in told["layers"]]}))
    layers = LayerList(listed, file)
    codes = Once(lambda: StoredCodes(path))
    found = attempt("codes", lambda: check_codes(lambda: iter_weights(file), codes, None, None, layers))
    assert found.status == "fail"
    assert "fc.weight: checkpoint: " in found.detail and "fc.weight: layers.json: int4-weight in INT8" in found.detail
