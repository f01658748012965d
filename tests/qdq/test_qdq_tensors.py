from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto
from qdq_graphs import TYPES, coded, node
from qdq_graphs import model as graph_model
from qdq_graphs import tensor as stored

from slope_compile.errors import ArtifactError
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.tensors import element_bits, load_model, to_numpy


@pytest.mark.parametrize(
    ("dtype", "raw", "expected"),
    [
        # ONNX: the first element sits in the lowest bits; an odd tail is padded with zeros.
        ("INT4", "f18703", [1, -1, 7, -8, 3]),
        ("UINT4", "f18703", [1, 15, 7, 8, 3]),
        ("INT2", "e401", [0, 1, -2, -1, 1]),
        ("UINT2", "e401", [0, 1, 2, 3, 1]),
        ("INT8", "0180ff7f05", [1, -128, -1, 127, 5]),
        ("FLOAT16", "003c00bc00000080ff7b", [1.0, -1.0, 0.0, -0.0, 65504.0]),
        ("BFLOAT16", "803f80bf0000008080ff", [1.0, -1.0, 0.0, -0.0, -np.inf]),
        ("FLOAT", "0000803f000080bf0000000000000080000000c0", [1.0, -1.0, 0.0, -0.0, -2.0]),
    ],
)
def test_golden_bytes(dtype: str, raw: str, expected: list[float]) -> None:
    tensor = TensorProto(dims=[5], data_type=TensorProto.DataType.Value(dtype), raw_data=bytes.fromhex(raw))
    array = to_numpy(tensor, None, "t")
    assert array.tolist() == expected
    assert array.dtype == (np.float32 if "FLOAT" in dtype else np.uint8 if dtype.startswith("U") else np.int8)
    assert len(tensor.raw_data) == -(-5 * element_bits(dtype) // 8)


@settings(deadline=None)
@given(st.sampled_from(["INT2", "UINT2", "INT4", "UINT4", "INT8"]), st.lists(st.integers(-128, 127), max_size=40))
def test_what_onnx_packs_is_what_is_read(dtype: str, values: list[int]) -> None:
    expected = np.array(values, dtype=np.int64).astype(TYPES[dtype]).astype(np.int64)
    for tensor in (
        stored("t", np.array(values, dtype=np.int64), dtype),
        onnx.helper.make_tensor("t", TensorProto.DataType.Value(dtype), [len(values)], expected.tolist()),
    ):
        assert to_numpy(tensor, None, "t").tolist() == expected.tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"data_type": 22, "dims": [4], "raw_data": b"\x01"},
        {"data_type": 22, "dims": [4], "raw_data": b"\x01\x02\x03"},
        {"data_type": 22, "dims": [4], "int32_data": [1]},
        {"data_type": 1, "dims": [3], "raw_data": b"\x01" * 11},
        {"data_type": 1, "dims": [3], "float_data": [1.0]},
        {"data_type": 1, "dims": [-1], "raw_data": b"\x01" * 8},
        {"data_type": 1, "dims": [2**40, 2**40], "raw_data": b"\x01" * 8},
        {"data_type": 1, "dims": [3]},
        {"data_type": 0, "dims": [1], "raw_data": b"1"},
        {"data_type": 99, "dims": [1], "raw_data": b"1"},
        {"data_type": 8, "dims": [1], "string_data": [b"1"]},
    ],
)
def test_malformed_tensors_are_named(fields: dict) -> None:
    with pytest.raises(ArtifactError, match="'odd one'"):
        to_numpy(TensorProto(**fields), None, "odd one")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    good = coded(np.zeros((4, 4, 1, 1)), np.ones(4)).SerializeToString()
    for content in (b"", b"\xff" * 100, good[: len(good) // 2], b"PK\x03\x04"):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"m\.onnx"):
            load_model(path)
    with pytest.raises(ArtifactError, match="no ONNX file"):
        load_model(tmp_path / "missing.onnx")


def external(path: Path, location: str, offset: str = "0", length: str = "64") -> None:
    """Write a model whose 4 x 4 float weight lies in another file."""
    weight = TensorProto(name="w", dims=[4, 4], data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=value)
    path.write_bytes(graph_model([node("MatMul", ["x", "w"], "y")], [weight]).SerializeToString())


def test_external_data_inside_the_folder_is_read(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.float32)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.data").write_bytes(values.tobytes())
    external(tmp_path / "m.onnx", "sub/w.data", offset="16")
    (weight,) = coded_weights(tmp_path / "m.onnx")
    assert weight.values().tolist() == values[4:].reshape(4, 4).tolist()


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("../secret", "0", "64"),
        ("sub/../../secret", "0", "64"),
        ("{root}/secret", "0", "64"),
        ("C:\\secret", "0", "64"),
        ("..\\secret", "0", "64"),
        ("link", "0", "64"),
        ("linked/secret", "0", "64"),
        ("", "0", "64"),
        ("a\0b", "0", "64"),
        ("a" * 5000, "0", "64"),
        ("missing", "0", "64"),
        ("pipe", "0", "64"),
        (".", "0", "64"),
        ("short", "0", "64"),
        ("good", "8", "64"),
        ("good", "99999999999999999999", "64"),
        ("good", "-8", "64"),
        ("good", "x", "64"),
        ("good", "0", "32"),
    ],
)
def test_external_data_that_cannot_be_trusted(tmp_path: Path, location: str, offset: str, length: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\1" * 64)
    (folder / "good").write_bytes(b"\1" * 64)
    (folder / "short").write_bytes(b"\1" * 63)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(folder / "pipe")
    external(folder / "m.onnx", location.replace("{root}", str(tmp_path)), offset, length)
    with pytest.raises(ArtifactError, match="'w'"):
        coded_weights(folder / "m.onnx")


def test_external_data_needs_a_folder(tmp_path: Path) -> None:
    external(tmp_path / "m.onnx", "good")
    with pytest.raises(ArtifactError, match="no folder"):
        coded_weights(onnx.load(tmp_path / "m.onnx", load_external_data=False))
