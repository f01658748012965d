"""The walk over an ONNX file's bytes: what is read through it is what protobuf and onnx read."""

from __future__ import annotations

import io
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from qdq_graphs import TYPES, coded, model, node, tensor

from slope_compile.errors import ArtifactError
from slope_compile.qdq.elements import CHUNK, Varints, read_elements
from slope_compile.qdq.reader import coded_weights, iter_weights
from slope_compile.qdq.tensors import external_location, load_graph, load_model, to_numpy
from slope_compile.qdq.wire import BIG, HERE, VARINTS

KINDS = [*TYPES, "INT32", "INT64", "DOUBLE"]


def constants(proto: ModelProto) -> list[TensorProto]:
    """Every tensor of a model, where it stands."""

    def inside(graph: Any) -> list[TensorProto]:
        found = [*graph.initializer]
        for one in graph.node:
            for attribute in one.attribute:
                found += [attribute.t] if attribute.HasField("t") else []
                found += [*attribute.tensors]
                for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                    found += inside(inner)
        return found

    return inside(proto.graph)


def plain(array: Any) -> Any:
    """As `to_numpy` shows it: small integers in 8 bits, halves in 32."""
    kind = array.dtype.name
    if kind in ("float16", "bfloat16"):
        return array.astype(np.float32)
    if "int4" in kind or "int2" in kind:
        return array.astype(np.uint8 if kind.startswith("u") else np.int8)
    return array


def make(name: str, dtype: str, size: int, raw: bool, rng: Any) -> TensorProto:
    kinds = TYPES | {"INT32": np.int32, "INT64": np.int64, "DOUBLE": np.float64}
    low, high = (0, 4) if dtype.startswith("U") else (-2, 2)
    array = rng.integers(low, high, size).astype(kinds[dtype])
    if raw:
        return numpy_helper.from_array(array, name)
    values = array.tolist() if dtype not in ("FLOAT16", "BFLOAT16") else array.astype(float).tolist()
    return helper.make_tensor(name, getattr(TensorProto, dtype), [size], values)


def big_and_small(rng: Any) -> ModelProto:
    """Tensors of every type and size, as initializers, constants, lists, in a subgraph and a function."""
    tensors = [
        make(f"{kind}.{size}.{raw}", kind, size, raw, rng)
        for kind in KINDS
        for size in (0, 3, 6001)
        for raw in (True, False)
    ]
    inner = helper.make_graph([node("Identity", ["i"], "j")], "inner", [], [], [make("i", "INT8", 5000, True, rng)])
    nodes = [
        node("Constant", [], "c", value=make("c", "FLOAT", 4000, True, rng)),
        node("Odd", [], "o", many=[make("m", "INT4", 9000, True, rng), make("n", "INT8", 7, True, rng)]),
        node("If", ["c"], "k", then_branch=inner, else_branch=inner),
    ]
    body = [node("Constant", [], "fc", value=make("fc", "FLOAT16", 3000, True, rng))]
    function = helper.make_function("local", "F", [], ["fc"], body, [helper.make_opsetid("", 25)])
    return model(nodes, tensors, functions=(function,))


def test_every_tensor_is_read_as_onnx_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = big_and_small(np.random.default_rng(0))
    path.write_bytes(whole.SerializeToString())
    slim = load_graph(path)
    assert len(slim.SerializeToString()) < 0.4 * path.stat().st_size
    pairs = list(zip(constants(whole), constants(slim), strict=True))
    functions = [one.functions[0].node[0].attribute[0].t for one in (whole, slim)]
    for expected, found in [*pairs, (functions[0], functions[1])]:
        array = to_numpy(found, path, "t")
        assert array.tobytes() == np.ascontiguousarray(plain(numpy_helper.to_array(expected))).tobytes(), expected.name
        assert array.shape == tuple(expected.dims)
    held = {tensor.name for tensor in constants(slim) if tensor.data_location == TensorProto.EXTERNAL}
    assert {"FLOAT.6001.True", "FLOAT.6001.False", "INT4.6001.False", "INT8.6001.False", "c", "i", "m"} <= held
    assert not {"INT4.3.True", "n"} & held


def test_what_is_left_in_the_model_is_what_it_was(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    whole = big_and_small(np.random.default_rng(0))
    path.write_bytes(whole.SerializeToString())
    slim = load_graph(path)
    for proto in (whole, slim):
        for one in [*constants(proto), proto.functions[0].node[0].attribute[0].t]:
            if one.name.partition(".")[2].startswith("6001") or one.name in ("c", "i", "m", "fc"):
                for field in ("raw_data", "int32_data", "float_data", "double_data", "data_location", "external_data"):
                    one.ClearField(field)
    assert slim == whole


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "FLOAT", "FLOAT16", "BFLOAT16"]),
    st.sampled_from(["Conv", "MatMul", "Gemm"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_streaming_reader_is_the_list_reader_is_onnx(
    tmp_path: Path, dtype: str, op: str, external: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shape = (8, 20, 3, 3) if op == "Conv" else (60, 24)
    low, high = {"INT2": (-2, 2), "UINT2": (0, 4), "UINT4": (0, 16), "INT8": (-128, 128)}.get(dtype, (-8, 8))
    values = rng.integers(max(low, 0) if dtype == "UINT8" else low, high, shape)
    if dtype in ("FLOAT", "FLOAT16", "BFLOAT16"):
        proto = model([node(op, ["x", "w"], "y")], [tensor("w", values, dtype)], rank=len(shape))
    else:
        proto = coded(values, rng.uniform(1, 2, shape[0]), dtype, op)
    path = tmp_path / "m.onnx"
    copy = ModelProto.FromString(proto.SerializeToString())  # saving moves the numbers out of what is saved
    (tmp_path / "w.data").unlink(missing_ok=True)
    onnx.save(copy, path, save_as_external_data=external, location="w.data", size_threshold=0)
    (one,) = iter_weights(path)
    (same,), (memory,) = coded_weights(path), coded_weights(proto)
    stored = plain(numpy_helper.to_array(proto.graph.initializer[0]))
    for found in (one, same, memory):
        assert found.stored.tobytes() == stored.tobytes() and found.stored.shape == shape
        assert found.values().tobytes() == memory.values().tobytes()
        assert (found.name, found.op, found.consumed_axis) == ("w", op, memory.consumed_axis)


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    nodes, tensors = [], []
    for index in range(32):  # of 1 MB each, inside the file
        codes = np.zeros((1024, 2048), np.int8)
        tensors.append(numpy_helper.from_array(codes.astype(ml_dtypes.int4), f"w{index}.codes"))
        tensors.append(numpy_helper.from_array(np.ones(1024, np.float32), f"w{index}.scale"))
        nodes += [
            node("DequantizeLinear", [f"w{index}.codes", f"w{index}.scale"], f"w{index}", axis=0),
            node("Gemm", ["x", f"w{index}"], f"y{index}", transB=1),
        ]
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes, tensors).SerializeToString())
    assert path.stat().st_size > 32e6
    del tensors, nodes
    tracemalloc.start()
    try:
        seen = 0
        for weight in iter_weights(path):
            seen += weight.stored.size
            del weight
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == 32 * 1024 * 2048
    assert peak < 2.1e6 + 20 * CHUNK  # one weight, a byte a code


def test_a_tensor_in_two_fields_stays_for_protobuf_to_judge(tmp_path: Path) -> None:
    numbers = np.arange(2 * BIG, dtype=np.float32)
    one = numpy_helper.from_array(numbers, "w").SerializeToString()
    raw = TensorProto(raw_data=(numbers + 1).tobytes()).SerializeToString()
    twice = graph_of(one + raw)  # protobuf takes the last one
    external = TensorProto(raw_data=numbers.tobytes(), data_location=TensorProto.EXTERNAL).SerializeToString()
    for data in (twice, graph_of(one + external), attribute_of(one, raw)):
        path = tmp_path / "m.onnx"
        path.write_bytes(data)
        assert load_graph(path) == load_model(path)


def graph_of(tensor: bytes) -> bytes:
    return field(7, field(5, tensor))


def attribute_of(*tensors: bytes) -> bytes:
    """A Constant whose tensor is written in parts, which protobuf merges."""
    attribute = AttributeProto(name="value", type=AttributeProto.TENSOR).SerializeToString()
    parts = attribute + b"".join(field(5, part) for part in tensors)
    constant = NodeProto(op_type="Constant", output=["w"]).SerializeToString() + field(5, parts)
    return field(7, field(1, constant))


def field(number: int, contents: bytes) -> bytes:
    length, size = len(contents), bytearray()
    while length >= 0x80:
        size.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([number << 3 | 2]) + bytes(size) + bytes([length]) + contents


def test_two_graphs_are_one_as_protobuf_merges_them(tmp_path: Path) -> None:
    parts = [
        GraphProto(initializer=[numpy_helper.from_array(np.full(BIG, value, np.float32), name)])
        for name, value in (("a", 1), ("b", 2))
    ]
    path = tmp_path / "m.onnx"
    path.write_bytes(b"".join(ModelProto(graph=part).SerializeToString() for part in parts))
    a, b = load_graph(path).graph.initializer
    assert (to_numpy(a, path, "a")[0], to_numpy(b, path, "b")[0]) == (1, 2)


def test_hostile_bytes_end_in_an_error_and_say_what_the_whole_says(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "m.onnx"
    good = model(
        [node("DequantizeLinear", ["w.codes", "w.scale"], "w", axis=0), node("Conv", ["x", "w"], "y")],
        [make_big(rng), tensor("w.scale", np.ones(8), "FLOAT")],
        rank=4,
    ).SerializeToString()
    read = 0
    for _ in range(500):
        data = bytearray(good)
        head = int(rng.integers(0, 40)), int(rng.integers(len(data) - 300, len(data)))
        for _ in range(rng.integers(1, 4)):
            data[rng.choice(head) if rng.random() < 0.7 else rng.integers(len(data))] = rng.integers(256)
        if rng.random() < 0.2:
            del data[rng.integers(len(data)) :]
        path.write_bytes(data)
        try:
            expected = [weight.stored.tobytes() for weight in coded_weights(load_model(path))]
        except ArtifactError:
            expected = None
        try:
            found = [weight.stored.tobytes() for weight in iter_weights(path)]
        except ArtifactError:
            found = None
        # A tensor that names other data is an error in memory, and may be found on the disk.
        assert expected is None or found == expected
        read += expected is not None
    assert 30 < read < 470


def make_big(rng: Any) -> TensorProto:
    codes = rng.integers(-8, 8, (8, 16, 3, 3))
    return helper.make_tensor("w.codes", TensorProto.INT4, codes.shape, codes.ravel().tolist())


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"offset": "0", "length": "999999999"}, "needs 4096 bytes; holds 999999999"),
        ({"offset": "999999999", "length": "4096"}, "needs bytes 999999999"),
        ({"offset": "0", "length": "100", VARINTS: "1"}, "cannot be read"),
        ({"offset": "-1", "length": "4096"}, "no number"),
    ],
)
def test_a_file_that_pretends_to_be_walked_reads_nothing_but_itself(
    tmp_path: Path, entries: dict[str, str], problem: str
) -> None:
    forged = TensorProto(name="w", dims=[1024, 1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": HERE, **entries}.items():
        forged.external_data.add(key=key, value=value)
    path = tmp_path / "m.onnx"
    path.write_bytes(model([node("MatMul", ["x", "w"], "y")], [forged]).SerializeToString())
    with pytest.raises(ArtifactError, match=problem):
        list(iter_weights(path))
    with pytest.raises(ArtifactError):
        to_numpy(forged, tmp_path, "w")  # a folder is no file


@pytest.mark.parametrize("location", ["\0", "\0" + "0" * 32, "w\0.data"])
@pytest.mark.parametrize("where", ["initializer", "constant", "list", "subgraph", "function"])
def test_a_location_that_only_this_process_may_say_is_refused(tmp_path: Path, where: str, location: str) -> None:
    """Its numbers would be the model's own bytes from anywhere, which no digest of external data covers."""
    forged = TensorProto(name="w", dims=[4, 1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, "offset": "0", "length": "16"}.items():
        forged.external_data.add(key=key, value=value)
    constant = node("Constant", [], "c", value=forged)
    inner = helper.make_graph([constant], "inner", [], [])
    functions = ()
    nodes, tensors = [node("MatMul", ["x", "w"], "y")], []
    if where == "initializer":
        tensors = [forged]
    elif where == "function":
        functions = (helper.make_function("local", "F", [], ["c"], [constant], [helper.make_opsetid("", 25)]),)
    else:
        more = {"constant": constant, "list": node("Odd", [], "o", many=[forged])}
        nodes.append(more.get(where) or node("If", ["x"], "k", then_branch=inner, else_branch=inner))
    path = tmp_path / "m.onnx"
    path.write_bytes(model(nodes, tensors, functions=functions).SerializeToString())
    for load in (load_graph, load_model):
        with pytest.raises(ArtifactError, match="tensor 'w' says that it lies in"):
            load(path)


def test_of_two_locations_the_one_that_is_read_is_told() -> None:
    twice = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for value in ("listed.data", "other.data"):
        twice.external_data.add(key="location", value=value)
    assert external_location(twice) == "other.data"


@pytest.mark.parametrize(("count", "problem"), [(2000, "more numbers"), (1200, "bytes are missing")])
def test_int32_data_of_another_length(tmp_path: Path, count: int, problem: str) -> None:
    path = tmp_path / "m.onnx"
    one = TensorProto(name="w", dims=[1500, 1], data_type=TensorProto.INT8, int32_data=[5] * count)
    path.write_bytes(model([node("MatMul", ["x", "w"], "y")], [one]).SerializeToString())
    with pytest.raises(ArtifactError, match=problem):
        list(iter_weights(path))


def test_integers_that_are_cut_off() -> None:
    for data in (b"\x80", b"\x05" * 10 + b"\xff" * 11 + b"\x01"):
        with pytest.raises((ValueError, EOFError)):
            read_elements(Varints(io.BytesIO(data), len(data), 1), "INT8", 20)


def test_a_model_behind_a_link_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(coded(np.ones((8, 16, 4, 4)), np.ones(8), "INT8").SerializeToString())
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    (weight,) = iter_weights(link)
    assert (weight.stored == 1).all()


def test_a_file_that_is_gone_since_it_was_walked(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(coded(np.ones((8, 16, 4, 4)), np.ones(8), "INT8").SerializeToString())
    slim = load_graph(path)
    path.unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        to_numpy(slim.graph.initializer[0], path, "w")
    path.write_bytes(b"short")
    with pytest.raises(ArtifactError, match="needs bytes"):
        to_numpy(slim.graph.initializer[0], path, "w")
