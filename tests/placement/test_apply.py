from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from slope_compile.errors import BackendError
from slope_compile.placement.apply import placed_model
from slope_compile.placement.choose import Place, place_all
from slope_compile.qdq.reader import coded_weights
from slope_compile.targets.backends import BACKENDS


def test_the_exported_file_where_everything_suits(net, tmp_path: Path) -> None:
    model = net()
    weights = coded_weights(model)
    backend = BACKENDS["tensorrt-rtx"]
    assert placed_model(model, weights, place_all(weights, backend), backend, tmp_path) == model


@pytest.mark.parametrize("conv", ["INT4", "INT2"])
def test_tensorrt_gets_int8_convolutions_and_int4_gemms(net, tmp_path: Path, conv: str) -> None:
    model = net(conv)
    weights, backend = coded_weights(model), BACKENDS["tensorrt"]
    placed = placed_model(model, weights, place_all(weights, backend), backend, tmp_path)
    assert placed.parent == tmp_path
    types = {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in onnx.load(placed).graph.initializer}
    assert types["c.weight.codes"] == "INT8"
    assert types["f.weight.codes"] == "INT4"
    assert types["h.weight"] == "FLOAT"
    for old, new in zip(weights, coded_weights(placed), strict=True):
        np.testing.assert_array_equal(old.values(), new.values())


def test_rtx_gets_2_bit_codes_as_int4(net, tmp_path: Path) -> None:
    model = net("INT2")
    weights, backend = coded_weights(model), BACKENDS["tensorrt-rtx"]
    placed = placed_model(model, weights, place_all(weights, backend), backend, tmp_path)
    assert [w.dtype for w in coded_weights(placed)] == ["INT4", "INT4", "FLOAT"]


def test_a_narrower_container_is_refused(net, tmp_path: Path) -> None:
    model = net("INT8")
    weights, backend = coded_weights(model), BACKENDS["tensorrt-rtx"]
    places = [Place("INT4", "int4-storage", ""), *place_all(weights, backend)[1:]]
    with pytest.raises(BackendError, match=r"c\.weight"):
        placed_model(model, weights, places, backend, tmp_path)
