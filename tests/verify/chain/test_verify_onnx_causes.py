"""What an ONNX file's nodes tell of its answers: which of them draw, and how far rounding may move them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from verify_twins import make_twin, node

from slope_compile.qdq.activations import stored_quantizers
from slope_compile.verify.chain.onnx_causes import onnx_causes
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.allowed import of_default, of_file
from slope_compile.verify.parity.operators import unknown_operators


def insert(model: onnx.ModelProto, *nodes: onnx.NodeProto) -> None:
    """Put nodes that make `c2` of `c` before the pool."""
    pool = node(model, "pool")
    pool.input[0] = "c2"
    place = list(model.graph.node).index(pool)
    for offset, one in enumerate(nodes):
        model.graph.node.insert(place + offset, one)


def constants(model: onnx.ModelProto, **values: Any) -> None:
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))


def rare_dropout(model: onnx.ModelProto) -> None:
    constants(model, ratio=np.float32(1e-7), on=True)
    insert(model, helper.make_node("Dropout", ["c", "ratio", "on"], ["c2"], "rare"))


def in_a_branch(model: onnx.ModelProto) -> None:
    constants(model, ratio=np.float32(1e-7), on=True)
    some, other = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("then.y", "else.y"))
    drop = helper.make_graph(
        [helper.make_node("Dropout", ["c", "ratio", "on"], ["then.y"], "rare")], "then", [], [some]
    )
    keep = helper.make_graph([helper.make_node("Identity", ["c"], ["else.y"], "kept")], "else", [], [other])
    insert(model, helper.make_node("If", ["on"], ["c2"], "if", then_branch=drop, else_branch=keep))


def in_a_function(model: onnx.ModelProto) -> None:
    """Whether it is on, the call says."""
    given = helper.make_node("Constant", [], ["number"])
    attribute = onnx.AttributeProto(name="value_int", type=onnx.AttributeProto.INT, ref_attr_name="mode")
    given.attribute.append(attribute)
    nodes = [
        given,
        helper.make_node("Cast", ["number"], ["on"], to=TensorProto.BOOL),
        helper.make_node("Constant", [], ["ratio"], value_float=1e-7),
        helper.make_node("Dropout", ["x", "ratio", "on"], ["y"], "rare"),
        helper.make_node("RandomNormalLike", ["x"], ["z"], "unread"),
    ]
    imports = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("local", "Act", ["x"], ["y", "z"], nodes, imports, ["mode"]))
    model.opset_import.append(helper.make_opsetid("local", 1))


def called_on(model: onnx.ModelProto) -> None:
    in_a_function(model)
    insert(model, helper.make_node("Act", ["c"], ["c2", "z"], "act", domain="local", mode=1))


def called_off(model: onnx.ModelProto) -> None:
    in_a_function(model)
    insert(model, helper.make_node("Act", ["c"], ["c2", "z"], "act", domain="local", mode=0))


def drops_nothing(model: onnx.ModelProto) -> None:
    constants(model, ratio=np.float32(0), on=True)
    insert(model, helper.make_node("Dropout", ["c", "ratio", "on"], ["c2"], "idle"))


def off_behind_copies(model: onnx.ModelProto) -> None:
    constants(model, ratio=np.float32(0.5), off=np.uint8(0))
    insert(
        model,
        helper.make_node("Identity", ["off"], ["same"]),
        helper.make_node("Cast", ["same"], ["flag"], to=TensorProto.BOOL),
        helper.make_node("Dropout", ["c", "ratio", "flag"], ["c2"], "idle"),
    )


def only_its_shape(model: onnx.ModelProto) -> None:
    insert(
        model,
        helper.make_node("RandomNormalLike", ["c"], ["r"], "noise"),
        helper.make_node("Shape", ["r"], ["s"]),
        helper.make_node("Reshape", ["c", "s"], ["c2"]),
    )


@pytest.mark.parametrize("edit", [rare_dropout, in_a_branch, called_on])
def test_what_draws_too_seldom_to_be_seen_fails(edit: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    twin = make_twin()
    found = verify_model(twin.write(tmp_path / "m.onnx", edit), golden=twin.golden(tmp_path / "g"))["repeatable"]
    assert (found.status, found.detail) == ("fail", "ONNX Runtime: node 'rare' (Dropout) is in training mode")


@pytest.mark.parametrize("edit", [called_off, drops_nothing, off_behind_copies, only_its_shape])
def test_what_never_draws_is_no_fault(edit: Callable[[onnx.ModelProto], None], tmp_path: Path) -> None:
    twin = make_twin()
    found = verify_model(twin.write(tmp_path / "m.onnx", edit), golden=twin.golden(tmp_path / "g"))["repeatable"]
    assert found.status == "pass", found.detail


def test_flags_in_external_data_are_read(tmp_path: Path) -> None:
    path = make_twin().write(tmp_path / "m.onnx", rare_dropout)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert onnx_causes(path).draws == ["node 'rare' (Dropout) is in training mode"]


def in_bits(k: int, **given: Any) -> Callable[[onnx.ModelProto], None]:
    """A product whose 4-bit weight no reader of ours reads."""

    def edit(model: onnx.ModelProto) -> None:
        blocks = k // 32
        codes = np.random.default_rng(0).integers(0, 256, (4, blocks, 16), np.uint8)
        constants(model, bits=codes, scales=np.full(4 * blocks, 0.1, np.float32))
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        node = helper.make_node("MatMulNBits", ["x", "bits", "scales"], ["y"], "product", domain="com.microsoft")
        node.attribute.extend(helper.make_attribute(name, v) for name, v in given.items())
        node.attribute.extend(
            helper.make_attribute(name, v) for name, v in {"K": k, "N": 4, "bits": 4, "block_size": 32}.items()
        )
        model.graph.node.append(node)

    return edit


@pytest.mark.parametrize(("level", "unknown"), [(0, []), (4, ["com.microsoft.MatMulNBits"])])
def test_a_product_in_bits_counts_with_its_k(level: int, unknown: list[str], tmp_path: Path) -> None:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", k]) for name, k in {"x": 256, "y": 4}.items()
    ]
    model = helper.make_model(helper.make_graph([], "bits", values[:1], values[1:]))
    in_bits(256, accuracy_level=level)(model)
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert of_file(path).relative == 16 * 2.0**-23
    assert unknown_operators(path) == unknown
    assert math.isinf(of_default(of_file(path), path, []).relative) is bool(unknown)


def mixed_by_what_has_no_bound(model: onnx.ModelProto) -> None:
    insert(
        model,
        helper.make_node("Einsum", ["c"], ["summed"], "sum", equation="bchw->chw"),
        helper.make_node("Sub", ["c", "summed"], ["c2"], "sub"),
    )


def test_what_no_bound_is_known_of_is_told_and_not_judged(tmp_path: Path) -> None:
    twin = make_twin()
    path = twin.write(tmp_path / "m.onnx", mixed_by_what_has_no_bound)
    verdict = verify_model(path, golden=twin.golden(tmp_path / "g"))
    assert verdict["repeatable"].status == verdict["parity.onnx-default"].status == "not checked"
    assert "(told, not judged: how Einsum sum up and round is not known here)" in verdict["repeatable"].detail
    assert verdict["parity.onnx"].status == "fail"  # what it should answer is known


def test_a_clip_that_ends_at_nan_is_told_by_its_name(tmp_path: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        constants(model, low=np.float32(0), high=np.float32(np.nan), step=np.float32(0.1), zero=np.int8(0))
        insert(
            model,
            helper.make_node("Clip", ["c", "low", "high"], ["clipped"], "clip"),
            helper.make_node("QuantizeLinear", ["clipped", "step", "zero"], ["q"], "q"),
            helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["c2"], "dq"),
        )

    twin = make_twin()
    path = twin.write(tmp_path / "m.onnx", edit)
    verdict = verify_model(path, golden=twin.golden(tmp_path / "g"))
    assert "high: finite: 1 of 1 are NaN" in verdict["pattern"].detail
    failed = [check for check in verdict.checks if check.status == "fail"]
    assert all("'high', an end of a Clip" in check.detail for check in failed if check.name != "pattern")
    assert not any("Error" in check.detail for check in verdict.checks)

    model = onnx.load(path)
    endless = next(tensor for tensor in model.graph.initializer if tensor.name == "high")
    endless.CopyFrom(numpy_helper.from_array(np.asarray(np.inf, np.float32), "high"))
    onnx.save(model, path)
    (quantizer,) = stored_quantizers(path)
    assert (quantizer.low, quantizer.high) == (0, 127)
