"""golden.safetensors is its model's, of its shapes, and finite."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from verify_twins import make_codes, make_twin

from slope_compile.codes_file import codes_digest
from slope_compile.errors import ArtifactError
from slope_compile.export.golden import write_golden
from slope_compile.verify.chain.golden import read_golden, require_own
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.outputs import named


def golden_of(twin: Any, path: Path, codes: Any = None) -> Path:
    """As export writes it: bound to the codes."""
    twin.golden(path)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
    write_golden(path, tensors["inputs"], {"output": tensors["outputs"]}, twin.codes if codes is None else codes)
    return path


@pytest.mark.parametrize("turned", [False, True])
def test_a_golden_file_of_this_model(tmp_path: Path, turned: bool) -> None:
    twin = replace(make_twin(), turned_fc=turned)
    model, path = twin.write(tmp_path / "m.onnx"), golden_of(twin, tmp_path / "g.safetensors")
    golden = read_golden(path)
    assert golden.codes == {name: codes_digest(coded.codes) for name, coded in twin.codes.items()}
    named(golden, model)
    assert verify_model(model, codes=twin.codes, golden=path)["parity.onnx"].status == "pass"


def test_a_golden_file_of_another_model_is_named_as_such(tmp_path: Path) -> None:
    twin, other = make_twin(), make_codes(bits=3)
    path = golden_of(twin, tmp_path / "g.safetensors", other)
    verdict = verify_model(twin.write(tmp_path / "m.onnx"), codes=twin.codes, golden=path)
    assert verdict["parity.onnx"].status == "fail"
    assert "g.safetensors is of another model: m.onnx holds none of the 3 coded" in verdict["parity.onnx"].detail


def test_names_of_another_model(tmp_path: Path) -> None:
    twin = make_twin()
    other = {f"other.{name}": coded for name, coded in twin.codes.items()}
    golden = read_golden(golden_of(twin, tmp_path / "g.safetensors", other))
    with pytest.raises(ArtifactError, match="is of another model"):
        require_own(golden, twin.write(tmp_path / "m.onnx"))


def test_one_damaged_weight_is_not_another_model(tmp_path: Path) -> None:
    twin = make_twin()
    codes = dict(twin.codes) | {"conv1.weight": make_codes(bits=3)["conv1.weight"]}
    require_own(read_golden(golden_of(twin, tmp_path / "g.safetensors", codes)), twin.write(tmp_path / "m.onnx"))


def test_older_files_are_known_by_their_outputs_alone(tmp_path: Path) -> None:
    twin = make_twin()
    golden = read_golden(twin.golden(tmp_path / "g.safetensors"))
    assert golden.codes == {}
    require_own(golden, tmp_path / "absent.onnx")


def test_bytes_depend_on_contents_alone(tmp_path: Path) -> None:
    twin = make_twin()
    first, second = (golden_of(twin, tmp_path / f"{name}.safetensors").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"inputs": np.full((2, 3), np.nan, np.float32)}, "6 of 6 numbers of 'inputs' are NaN"),
        ({"outputs": np.full((2, 3), np.inf, np.float32)}, "6 of 6 numbers of 'outputs' are NaN or infinite"),
        ({"outputs": np.ones((3, 3), np.float32)}, "not one output a sample"),
        ({"inputs": np.ones((), np.float32)}, "not one output a sample"),
        ({"inputs": np.ones((0, 3), np.float32), "outputs": np.ones((0, 3), np.float32)}, "not one output a sample"),
        ({"more": np.ones(2, np.float32)}, "no golden samples"),
        ({f"outputs.{i}": np.ones((2, 1), np.float32) for i in range(1001)}, "more than 1000"),
    ],
)
def test_bounds(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "g.safetensors"
    save_file({"inputs": np.ones((2, 3), np.float32), "outputs": np.ones((2, 3), np.float32)} | change, path)
    with pytest.raises(ArtifactError, match=said):
        read_golden(path)


@pytest.mark.parametrize("header", ["[1]", "{", '{"a": {', "9"])
def test_a_hostile_header(tmp_path: Path, header: str) -> None:
    path = tmp_path / "g.safetensors"
    arrays = {"inputs": np.ones((2, 3), np.float32), "outputs": np.ones((2, 3), np.float32)}
    save_file(arrays, path, metadata={"codes": header})
    with pytest.raises(ArtifactError, match=r"g\.safetensors is no safetensors file"):
        read_golden(path)
    save_file(arrays, path, metadata={"codes": json.dumps({"a": 1})})
    assert read_golden(path).codes == {"a": "1"}


def test_outputs_of_another_shape(tmp_path: Path) -> None:
    twin = make_twin()
    path = twin.golden(tmp_path / "g.safetensors")
    tensors = load_file(path)
    save_file({**tensors, "outputs": np.ascontiguousarray(tensors["outputs"][:, :-1])}, path)
    with pytest.raises(
        ArtifactError, match=r"The golden output 'output' is \[5, 5\]; the ONNX model has \['batch', 6\]"
    ):
        named(read_golden(path), twin.write(tmp_path / "m.onnx"))
