"""The Python of docs/artifacts.md runs, on files of the form that it describes, and tells the truth about them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from slope_compile.codes_file import save_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.train.validation import Classified, save_record

TEXT = (Path(__file__).parents[2] / "docs" / "artifacts.md").read_text(encoding="utf-8")
NAME = "layer1.0.conv1.weight"


def snippet(word: str) -> str:
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if word in block]
    return str(found)


def coded() -> CodedTensor:
    codes = np.zeros((8, 8, 1, 1), np.int8)
    codes[:, ::4] = -8
    codes[:, 1::4] = 7
    return CodedTensor(codes=codes, scale=np.full(8, 0.25, np.float32), bits=4, axis=0, pattern=(2, 4))


def test_codes_are_read_with_plain_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_codes(tmp_path / "codes.safetensors", {NAME: coded()})
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(snippet("coded_tensors"), names)
    assert capsys.readouterr().out == f"{NAME} 4 2:4 0.5\n"
    assert np.array_equal(np.asarray(names["weight"]), coded().dequantize())


def test_single_answers_are_read_with_plain_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.arange(4, dtype=np.int32)
    fp32, compressed = (Classified(labels, np.array(found, np.int32)) for found in ([0, 1, 2, 0], [0, 0, 2, 3]))
    save_record(tmp_path / "validation.safetensors", fp32, compressed)
    monkeypatch.chdir(tmp_path)
    exec(snippet("turned wrong"), {})
    assert capsys.readouterr().out == "0.75 0.75 1 turned wrong, 1 turned right\n"


def test_an_onnx_file_is_read_with_plain_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = coded()
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", [f"{NAME}.codes", f"{NAME}.scale"], [NAME], axis=0, name=f"{NAME}.dq"),
            helper.make_node("Conv", ["x", NAME], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8, 4, 4])],
        [
            helper.make_tensor(f"{NAME}.codes", TensorProto.INT4, tensor.codes.shape, tensor.codes.ravel()),
            onnx.numpy_helper.from_array(tensor.scale, f"{NAME}.scale"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    exec(snippet("onnx.load"), {})
    assert capsys.readouterr().out == f"{NAME} INT4 2\n"
