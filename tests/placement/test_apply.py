from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_nets import coded as blocked
from onnx_nets import save
from placement_models import place, run, situation
from qdq_graphs import coded

import slope_compile.placement.save as save_module
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.placement.apply import placed_model, prove
from slope_compile.placement.choose import Place, choose_places
from slope_compile.placement.dense import dense_twin
from slope_compile.qdq.reader import coded_weights


def types(path: Path) -> dict[str, str]:
    return {t.name: TensorProto.DataType.Name(t.data_type) for t in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("conv", ["INT4", "INT2"])
def test_tensorrt_gets_int8_convolutions_and_int4_gemms(net: Any, tmp_path: Path, conv: str) -> None:
    model = net(conv)
    placed, places = place(model, situation(precision="fp32"), tmp_path)
    assert placed == tmp_path / "placed.onnx"
    assert [one.placement for one in places] == ["int8-weight", "int4-weight", "float"]
    assert types(placed)["c.weight.codes"] == "INT8"
    assert types(placed)["f.weight.codes"] == "INT4"
    assert types(placed)["h.weight"] == "FLOAT"
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    assert np.array_equal(run(placed, x), run(model, x))


def test_rtx_gets_2_bit_codes_as_int4(net: Any, tmp_path: Path) -> None:
    placed, _ = place(net("INT2"), situation(backend="tensorrt-rtx", precision="fp32"), tmp_path)
    assert [w.dtype for w in coded_weights(placed)] == ["INT4", "INT4", "FLOAT"]


def test_a_model_without_codes_is_written_too(tmp_path: Path) -> None:
    source = coded(np.ones((4, 4)), 1.0, op="MatMul")
    source.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    del source.graph.initializer[1], source.graph.node[0]
    model = tmp_path / "model.onnx"
    onnx.save(source, model)
    placed, places = place(model, situation(precision="fp32"), tmp_path)
    assert placed.is_file() and [one.placement for one in places] == ["float"]
    assert places[0].reason == "stored as FLOAT: not compressed"


def in_constant_nodes(path: Path) -> Path:
    source = coded(np.random.default_rng(0).integers(-8, 8, (128, 4)), 0.5, "INT8", op="MatMul")
    for tensor in list(source.graph.initializer):
        source.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del source.graph.initializer[:]
    onnx.save(source, path)
    return path


def test_codes_in_a_constant_node_are_placed(tmp_path: Path) -> None:
    model = in_constant_nodes(tmp_path / "model.onnx")
    placed, places = place(model, situation(precision="fp32"), tmp_path)
    assert (places[0].placement, types(placed)["w.codes"]) == ("int4-weight", "INT4")


def test_big_models_keep_their_tensors_beside_them(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "INLINE_BYTES", 1000)
    model = net()
    placed, _ = place(model, situation(precision="fp32"), tmp_path)
    assert (tmp_path / "placed.data").stat().st_size > 1000
    assert placed.stat().st_size < model.stat().st_size
    x = np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)
    assert np.array_equal(run(placed, x), run(model, x))


def test_a_place_that_the_codes_do_not_fit_is_refused(net: Any, tmp_path: Path) -> None:
    model, one = net("INT8"), situation(backend="tensorrt-rtx", precision="fp32")
    weights = coded_weights(model)
    codes = weights[0].stored.copy()
    assert np.abs(codes).max() <= 7
    proto = onnx.load(model)
    codes[0, 0, 0, 0] = 100
    tensor = next(t for t in proto.graph.initializer if t.name == "c.weight.codes")
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    wide = tmp_path / "wide.onnx"
    onnx.save(proto, wide)
    weights = coded_weights(wide)
    places = [Place("INT4", "int4-storage", ""), *choose_places(wide, weights, one)[1:]]
    with pytest.raises(BackendError, match=r"'c\.weight' span \[.*100\], which INT4 cannot hold"):
        placed_model(wide, weights, places, one, tmp_path)


def test_scales_that_fit_no_block_are_refused(net: Any, tmp_path: Path) -> None:
    model, one = net(), situation(precision="fp32")
    weights = coded_weights(model)
    places = choose_places(model, weights, one)
    with pytest.raises(BackendError, match=r"'c\.weight' do not fit blocks of 64"):
        placed_model(model, weights, [replace(places[0], block_size=64), *places[1:]], one, tmp_path)


def change_code(tensor: TensorProto) -> None:
    codes = numpy_helper.to_array(tensor).astype(np.int8)
    codes.flat[5] += 1 if codes.flat[5] < 7 else -1
    kind = ml_dtypes.int4 if tensor.data_type == TensorProto.INT4 else np.int8
    tensor.CopyFrom(numpy_helper.from_array(codes.astype(kind), tensor.name))


def change_scale(tensor: TensorProto) -> None:
    scale = numpy_helper.to_array(tensor).copy()
    scale.flat[0] = np.nextafter(scale.flat[0], np.float32(1))
    tensor.CopyFrom(numpy_helper.from_array(scale, tensor.name))


def widen(tensor: TensorProto) -> None:
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int8), tensor.name))


MUTATIONS: dict[str, tuple[str, Callable[[TensorProto], None]]] = {
    "a code": ("f.weight.codes", change_code),
    "a code of a convolution": ("c.weight.codes", change_code),
    "an ulp of a scale": ("f.weight.scale", change_scale),
    "an ulp of a channel's scale": ("c.weight.scale", change_scale),
    "an ulp of a float": ("h.weight", change_scale),
    "another type": ("f.weight.codes", widen),
}


@pytest.mark.parametrize("what", MUTATIONS)
def test_the_proof_sees_what_changed_after_the_passes(net: Any, tmp_path: Path, what: str) -> None:
    model = net()
    placed, places = place(model, situation(precision="fp32"), tmp_path)
    prove(placed, coded_weights(model), places)
    name, mutate = MUTATIONS[what]
    proto = onnx.load(placed)
    mutate(next(t for t in proto.graph.initializer if t.name == name))
    onnx.save(proto, placed)
    with pytest.raises(BackendError, match=name.removesuffix(".codes").removesuffix(".scale")):
        prove(placed, coded_weights(model), places)


@pytest.mark.parametrize("placement", ["sparse-fp16", "float"])
def test_the_proof_sees_a_changed_constant(net: Any, tmp_path: Path, placement: Any) -> None:
    model = net()
    one = replace(situation(precision="fp16"), overrides={"c": placement})
    placed, places = place(model, one, tmp_path)
    assert types(placed)["c.weight"] == "FLOAT16"
    proto = onnx.load(placed)
    tensor = next(t for t in proto.graph.initializer if t.name == "c.weight")
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nextafter(values.flat[0], np.float16(9))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(proto, placed)
    with pytest.raises(BackendError, match=r"'c\.weight' could not be placed as .*: values differ"):
        prove(placed, coded_weights(model), places)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_last_block_that_is_short_is_filled_with_zeros(tmp_path: Path, backend: str) -> None:
    """TensorRT-RTX would read 200 codes with two scales as blocks of 100, whatever block_size says."""
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-7, 8, (200, 64)), rng.uniform(0.1, 1, (2, 64)).astype(np.float32)
    w, dq = blocked("w", codes, scale, "INT4", axis=0, block_size=128)
    model = save(tmp_path / "model.onnx", [dq, helper.make_node("MatMul", ["x", "w"], ["y"])], w, ["n", 200], "y")
    placed, places = place(model, situation(backend=backend, precision="fp32"), tmp_path)
    assert [(one.placement, one.block_size) for one in places] == [("int4-weight", 128)]
    (weight,) = coded_weights(placed)
    assert weight.stored.shape == (256, 64) and not weight.stored[200:].any()
    x = rng.standard_normal((3, 200)).astype(np.float32)
    assert np.allclose(run(placed, x), run(model, x), rtol=1e-5, atol=1e-4)


def test_padding_that_is_not_zero_is_seen(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    source = coded(np.random.default_rng(0).integers(-8, 8, (100, 4)), 0.5, op="MatMul")
    onnx.save(source, model)
    placed, places = place(model, situation(precision="fp32"), tmp_path)
    proto = onnx.load(placed)
    tensor = next(t for t in proto.graph.initializer if t.name == "w.codes")
    codes = numpy_helper.to_array(tensor).copy()
    assert codes.shape == (128, 4)
    codes[120, 2] = 1
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))
    onnx.save(proto, placed)
    with pytest.raises(BackendError, match="padded with is not zero"):
        prove(placed, coded_weights(model), places)


def test_a_weight_that_vanished_is_named(net: Any, tmp_path: Path) -> None:
    model = net()
    placed, places = place(model, situation(precision="fp32"), tmp_path)
    weights = coded_weights(model)
    with pytest.raises(BackendError, match=r"holds other weights than the model: lost\.weight"):
        prove(placed, [*weights, replace(weights[0], name="lost.weight")], [*places, places[0]])


def test_external_data_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(64))
    source = coded(np.ones((4, 4)), 1.0, op="MatMul")
    stolen = TensorProto(name="b", dims=[4], data_type=1, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "../secret"), ("length", "16")):
        stolen.external_data.add(key=key, value=value)
    source.graph.initializer.append(stolen)
    source.graph.node[1].output[0] = "m"
    source.graph.node.append(helper.make_node("Add", ["m", "b"], ["y"]))
    (tmp_path / "inside").mkdir()
    model = tmp_path / "inside" / "model.onnx"
    model.write_bytes(source.SerializeToString())
    with pytest.raises(ArtifactError, match="outside"):
        place(model, situation(precision="fp32"), tmp_path)


def test_the_dense_twin_has_the_weights_and_nothing_else(net: Any, tmp_path: Path) -> None:
    model = net()
    dense = dense_twin(model, tmp_path)
    assert dense == tmp_path / "dense.onnx"
    assert set(types(dense).values()) == {"FLOAT"}
    for old, new in zip(coded_weights(model), coded_weights(dense), strict=True):
        assert (old.name, new.codes) == (new.name, None) and np.array_equal(old.values(), new.values())
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(dense, x), run(model, x), rtol=1e-5, atol=1e-5)


def test_codes_in_a_constant_node_have_a_dense_twin(tmp_path: Path) -> None:
    model = in_constant_nodes(tmp_path / "model.onnx")
    (old,), (new,) = coded_weights(model), coded_weights(dense_twin(model, tmp_path))
    assert new.codes is None and np.array_equal(old.values(), new.values())
