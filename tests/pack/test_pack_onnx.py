"""ONNX files of whatever origin come back bit for bit, with their external data."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import coded, save
from pack_files import sparse
from pack_reader import Reader

import slope_compile as sc
from slope_compile.errors import ArtifactError, CheckFailedError, StorageError
from slope_compile.pack import write
from slope_compile.pack.read import Packed, open_packed
from slope_compile.pack.write import pack_onnx

KINDS = {
    "INT2": ml_dtypes.int2, "UINT2": ml_dtypes.uint2, "INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT8": np.int8,
    "UINT8": np.uint8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_, "FLOAT": np.float32,
    "FLOAT16": np.float16, "BFLOAT16": ml_dtypes.bfloat16, "DOUBLE": np.float64, "COMPLEX64": np.complex64,
    "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn,
}  # fmt: skip


def restored(onnx_file: Path, packed: Packed, folder: Path) -> list[str]:
    """Restore into an empty folder; every file is the one beside the model. Return their names."""
    paths = packed.restore(folder)
    names = [path.relative_to(folder).as_posix() for path in paths]
    assert names == list(packed.files) and names[0] == onnx_file.name
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == set(names)
    for name, path in zip(names, paths, strict=True):
        assert path.read_bytes() == (onnx_file.parent / name).read_bytes()
    return names


def a_tensor(name: str, kind: str, shape: tuple[int, ...], seed: int = 0) -> TensorProto:
    values = np.random.default_rng(seed).normal(0, 3, shape)
    if "INT" in kind or kind == "BOOL":
        values = np.clip(np.abs(values) if kind[0] == "U" else values, -2, 1).round() * (1 if "INT2" in kind else 3)
    return numpy_helper.from_array(values.astype(KINDS[kind]), name)


def a_model(path: Path, tensors: list[TensorProto], nodes: list[Any] | None = None) -> Path:
    return save(path, nodes or [helper.make_node("Identity", ["x"], ["y"])], tensors, [1], "y")


def external(path: Path, location: str = "m.data", threshold: int = 0) -> Path:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location=location, size_threshold=threshold)
    return path


@pytest.mark.parametrize("dtype", ["INT4", "INT8"])
@pytest.mark.parametrize("outside", [False, True])
def test_a_coded_model_is_given_back_and_its_pattern_is_found(dtype: str, outside: bool, tmp_path: Path) -> None:
    codes = sparse((32, 64, 3, 3), 2, 4, 1)
    tensors, node = coded("w", codes, np.full(32, 0.5), dtype, axis=0)
    tensors.append(a_tensor("bias", "FLOAT", (1000,)))
    path = save(tmp_path / "m.onnx", [node], tensors, [1], "y")
    if outside:
        external(path)
    packed = sc.pack(path, tmp_path / "m.slope")
    assert restored(path, packed, tmp_path / "out") == (["m.onnx", "m.data"] if outside else ["m.onnx"])
    row = next(row for row in packed.sizes.tensors if row.name == "w.codes")
    assert (row.dtype, row.pattern, row.shape) == (dtype, "2:4", (32, 64, 3, 3))
    assert row.packed < codes.size * row.bits / 8
    sizes = packed.sizes
    assert sizes.model == sizes.weights + sizes.others + sizes.rest == (tmp_path / "m.slope").stat().st_size


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_type_comes_back_and_a_second_reader_finds_it(kind: str, tmp_path: Path) -> None:
    tensors = [a_tensor(f"t{i}", kind, shape, i) for i, shape in enumerate([(4001,), (), (0, 3), (33, 31, 5), (7,)])]
    path = a_model(tmp_path / "m.onnx", tensors)
    for step in ("inside", "outside"):
        if step == "outside":
            external(path)
        packed = pack_onnx(path, tmp_path / "m.slope")
        names = restored(path, packed, tmp_path / step)
        files = Reader((tmp_path / "m.slope").read_bytes()).files()
        assert files == {name: (tmp_path / name).read_bytes() for name in names}


def test_wherever_a_tensor_stands(tmp_path: Path) -> None:
    """Attributes, lists, subgraphs, functions, sparse tensors, numbers in their own fields, no numbers at all."""
    big = [a_tensor(f"b{i}", kind, (3000,), i) for i, kind in enumerate(["FLOAT", "INT4", "INT8", "FLOAT16"])]
    inner = helper.make_graph([helper.make_node("Identity", ["b2"], ["j"])], "inner", [], [], [big[2]])
    plain = helper.make_tensor("plain", TensorProto.INT4, [5000], np.arange(5000) % 7)
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a" * 2000, b"b"])
    values, indices = a_tensor("sparse", "FLOAT", (600,)), numpy_helper.from_array(np.arange(600), "at")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=big[0]),
        helper.make_node("Odd", ["c"], ["o"], domain="d", many=[big[1], plain]),
        helper.make_node("If", ["c"], ["k"], then_branch=inner, else_branch=inner),
        helper.make_node("F", [], ["y"], domain="local"),
    ]
    path = a_model(tmp_path / "m.onnx", [plain, words, a_tensor("small", "FLOAT", (3,))], nodes)
    model = onnx.load(path)
    body = [helper.make_node("Constant", [], ["fc"], value=big[3])]
    model.functions.append(helper.make_function("local", "F", [], ["fc"], body, [helper.make_opsetid("", 21)]))
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9000]))
    model.opset_import.append(helper.make_opsetid("local", 1))
    onnx.save(model, path)
    packed = pack_onnx(path, tmp_path / "m.slope")
    restored(path, packed, tmp_path / "out")
    names = [row.name for row in packed.sizes.tensors]
    assert {"b0", "b1", "b2", "b3"} <= set(names) and names.count("b2") == 2
    assert [row.packed > 0 for row in packed.sizes.tensors if row.name == "b2"] == [True, False]  # kept once


def test_float_models_pack_too(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(0, 0.02, (200, 500)).astype(np.float32)
    path = a_model(tmp_path / "m.onnx", [numpy_helper.from_array(weight, "w")])
    packed = pack_onnx(path, tmp_path / "m.slope")
    restored(path, packed, tmp_path / "out")
    assert packed.sizes.weights == 0 and packed.sizes.others < 0.95 * weight.nbytes
    assert packed.kind == "onnx" and not packed.codes and not packed.tensors and "files=1" in repr(packed)


def located(tensor: TensorProto, location: str, offset: int | None, length: int | None) -> TensorProto:
    moved = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    moved.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": offset, "length": length}.items():
        if value is not None:
            moved.external_data.add(key=key, value=str(value))
    return moved


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_shared_overlapping_and_scattered_ranges_come_back(tmp_path: Path, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    sizes = {"a.bin": 20_000, "sub/b.bin": 9001, "empty.bin": 0}
    for name, size in sizes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.integers(0, 4, size).astype(np.uint8).tobytes())
    tensors = []
    for index in range(data.draw(st.integers(0, 6))):
        name = data.draw(st.sampled_from(sorted(sizes)))
        kind = data.draw(st.sampled_from(["FLOAT", "INT4", "UINT8", "INT64", "BFLOAT16", "STRING"]))
        offset = data.draw(st.integers(0, sizes[name]))
        length = data.draw(st.integers(0, sizes[name] - offset))
        elements = length * {"FLOAT": 2, "INT4": 16, "UINT8": 8, "INT64": 1, "BFLOAT16": 4, "STRING": 8}[kind] // 8
        tensor = TensorProto(name=f"t{index}", data_type=getattr(TensorProto, kind), dims=[elements])
        place = f"./{name}" if data.draw(st.booleans()) else name
        tensors.append(located(tensor, place, offset, length if data.draw(st.booleans()) or length else None))
    path = a_model(folder / "m.onnx", tensors)
    packed = pack_onnx(path, folder / "m.slope")
    restored(path, packed, folder / "out")


def test_a_long_rest_is_cut_and_gaps_are_kept(tmp_path: Path) -> None:
    junk = np.random.default_rng(0).integers(0, 256, 3 << 20).astype(np.uint8).tobytes()
    (tmp_path / "m.bin").write_bytes(junk + bytes(4096) + b"tail")
    path = a_model(tmp_path / "m.onnx", [located(a_tensor("z", "FLOAT", (1024,)), "m.bin", 3 << 20, 4096)])
    packed = pack_onnx(path, tmp_path / "m.slope")
    restored(path, packed, tmp_path / "out")
    assert [row.dtype for row in packed.sizes.tensors] == ["BYTES", "FLOAT"]


def test_odd_padding_of_packed_integers_is_kept(tmp_path: Path) -> None:
    tensor = a_tensor("w", "INT4", (3001,))
    tensor.raw_data = tensor.raw_data[:-1] + bytes([tensor.raw_data[-1] | 0xF0])
    path = a_model(tmp_path / "m.onnx", [tensor])
    packed = pack_onnx(path, tmp_path / "m.slope")
    restored(path, packed, tmp_path / "out")
    assert packed.sizes.weights == 0


def test_a_sparse_uint4_around_its_zero_point_is_found(tmp_path: Path) -> None:
    codes = (sparse((64, 64), 2, 4, 1).astype(np.int16) + 8).astype(ml_dtypes.uint4)
    path = a_model(tmp_path / "m.onnx", [numpy_helper.from_array(codes, "w")])
    packed = pack_onnx(path, tmp_path / "m.slope")
    restored(path, packed, tmp_path / "out")
    assert packed.sizes.tensors[0].pattern == "2:4"


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = external(a_model(tmp_path / "m.onnx", [a_tensor("w", "INT8", (64, 64)), a_tensor("b", "FLOAT", (999,))]))
    assert (
        pack_onnx(path, tmp_path / "a.slope").path.read_bytes()
        == pack_onnx(path, tmp_path / "b.slope").path.read_bytes()
    )


@pytest.mark.parametrize(
    ("location", "told"),
    [
        ("../m.bin", "outside"),
        ("/etc/passwd", "outside"),
        ("none.bin", "missing"),
        ("link.bin", "outside"),
        ("d", "missing"),
    ],
)
def test_external_data_must_lie_in_the_folder(location: str, told: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "d").mkdir(parents=True)
    (tmp_path / "m.bin").write_bytes(bytes(8000))
    (folder / "link.bin").symlink_to(tmp_path / "m.bin")
    path = a_model(folder / "m.onnx", [located(a_tensor("w", "FLOAT", (1000,)), location, 0, 4000)])
    with pytest.raises(ArtifactError, match=told):
        pack_onnx(path, tmp_path / "m.slope")
    assert not (tmp_path / "m.slope").exists()


@pytest.mark.parametrize(
    ("offset", "length", "told"),
    [("0", "4001", "which has 4000"), ("-1", "4", "no number"), ("0", "9" * 4000, "no number")],
)
def test_external_data_that_is_cut_off_is_refused(offset: str, length: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(bytes(4000))
    tensor = located(a_tensor("w", "FLOAT", (1000,)), "m.bin", None, None)
    tensor.external_data.add(key="offset", value=offset)
    tensor.external_data.add(key="length", value=length)
    path = a_model(tmp_path / "m.onnx", [tensor])
    with pytest.raises(ArtifactError, match=told) as raised:
        pack_onnx(path, tmp_path / "m.slope")
    assert len(str(raised.value)) < 500


def test_what_is_no_onnx_file_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.slope"
    (tmp_path / "text.onnx").write_text("no model")
    for name, told in {"none.onnx": "no ONNX file", "text.onnx": "no ONNX model", ".": "no ONNX file"}.items():
        with pytest.raises(ArtifactError, match=told):
            sc.pack(tmp_path / name, out)
    path = a_model(tmp_path / "m.onnx", [a_tensor("w", "FLOAT", (1000,))])
    with pytest.raises(StorageError, match="is a file that is to be packed"):
        sc.pack(path, path)
    assert onnx.load(path) and not out.exists()


def test_a_file_that_changes_while_it_is_packed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_model(tmp_path / "m.onnx", [a_tensor("w", "FLOAT", (1000,))])
    real = write.FileDigest.of

    def later(file: Path) -> Any:
        file.write_bytes(file.read_bytes()[:-1] + b"\0")
        return real(file)

    monkeypatch.setattr(write.FileDigest, "of", later)
    with pytest.raises(CheckFailedError, match="would be restored with sha256"):
        pack_onnx(path, tmp_path / "m.slope")
    assert not (tmp_path / "m.slope").exists()


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """Forty tensors of 128 KiB: packing and restoring hold a few times one of them, and buffers of 1 MiB."""
    size = 1 << 17
    tensors = [
        located(TensorProto(name=f"t{i}", data_type=TensorProto.INT8, dims=[256, 512]), "m.bin", i * size, size)
        for i in range(40)
    ]
    rng = np.random.default_rng(0)
    with (tmp_path / "m.bin").open("wb") as file:
        for _ in tensors:
            codes = rng.integers(-8, 8, (256, 512)).astype(np.int8)
            codes[:, 2::4] = codes[:, 3::4] = 0
            file.write(codes.tobytes())
    path = a_model(tmp_path / "m.onnx", tensors)
    packed = pack_onnx(path, tmp_path / "warm.slope")  # imports and caches
    tracemalloc.start()
    try:
        pack_onnx(path, tmp_path / "m.slope")
        writing = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        open_packed(tmp_path / "m.slope").restore(tmp_path / "out")
        reading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert packed.sizes.model > 8 * size
    assert writing < 20 * size and reading < 20 * size
