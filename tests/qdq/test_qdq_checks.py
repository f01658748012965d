from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qdq_graphs import coded, model, node, sparse_codes, tensor

from slope_compile.compression.codes import CodedTensor
from slope_compile.qdq.checks import check_model, check_pattern, check_weight
from slope_compile.qdq.reader import coded_weights

RNG = np.random.default_rng(3)
CODES = sparse_codes(RNG, (8, 8, 3, 3), 4, axis=1)
SCALE = RNG.uniform(0.5, 2, 8).astype(np.float32)
TRAINED = {"w": CodedTensor(CODES, SCALE, 4, 0, (2, 4))}


def rules(source: onnx.ModelProto, trained: dict[str, CodedTensor] = TRAINED) -> set[str]:
    findings = check_model(coded_weights(source), trained)
    assert {finding.tensor for finding in findings} <= {"w"}
    return {finding.rule for finding in findings}


def initializer(source: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in source.graph.initializer if t.name == name)


def test_what_was_trained_has_no_findings() -> None:
    assert rules(coded(CODES, SCALE)) == set()
    assert rules(coded(CODES, SCALE, zero_point=np.zeros(8))) == set()


def flip_nibble(source: onnx.ModelProto) -> None:
    codes = initializer(source, "w.codes")
    raw = bytearray(codes.raw_data)
    raw[17] ^= 0x10
    codes.raw_data = bytes(raw)


def set_scale(value: float) -> Callable[[onnx.ModelProto], None]:
    def change(source: onnx.ModelProto) -> None:
        scale = SCALE.copy()
        scale[3] = value
        initializer(source, "w.scale").CopyFrom(tensor("w.scale", scale, "FLOAT"))

    return change


def break_group(source: onnx.ModelProto) -> None:
    codes = CODES.copy()
    codes[2, 4:7, 1, 1] = 1
    initializer(source, "w.codes").CopyFrom(tensor("w.codes", codes, "INT4"))


def transpose(source: onnx.ModelProto) -> None:
    initializer(source, "w.codes").CopyFrom(tensor("w.codes", CODES.swapaxes(0, 1), "INT4"))


def store_floats(source: onnx.ModelProto) -> None:
    del source.graph.node[0]
    source.graph.initializer.append(tensor("w", CODES * SCALE.reshape(8, 1, 1, 1), "FLOAT"))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (flip_nibble, "codes"),
        (set_scale(-1.0), "scale"),
        (set_scale(0.0), "scale"),
        (set_scale(np.nan), "scale"),
        (set_scale(np.inf), "scale"),
        (set_scale(np.nextafter(SCALE[3], np.float32(9))), "scale"),
        (break_group, "pattern"),
        (transpose, "codes"),
        (store_floats, "codes"),
        (lambda source: source.graph.node.__delitem__(1), "missing"),
    ],
)
def test_each_change_is_found_and_named(change: Callable[[onnx.ModelProto], Any], rule: str) -> None:
    source = coded(CODES, SCALE)
    change(source)
    assert rule in rules(source)


def test_other_breaches() -> None:
    assert "zero point" in rules(coded(CODES, SCALE, zero_point=np.eye(8)[3]))
    assert rules(coded(CODES[:4], SCALE[:4])) == {"shape"}
    assert "scale" in rules(coded(CODES, np.float32(SCALE[0])))
    assert "scale" in rules(coded(CODES, SCALE, axis=1))
    assert "range" in rules(coded(CODES, SCALE), {"w": CodedTensor(CODES, SCALE, 2, 0, (2, 4))})
    assert "pattern" in rules(coded(CODES, SCALE), {"w": CodedTensor(CODES, SCALE, 4, 0, (1, 8))})
    loose = model(
        [node("Cast", ["w.codes"], "w", to=1), node("Conv", ["x", "w"], "y")], [tensor("w.codes", CODES, "INT4")]
    )
    assert "scale" in rules(loose)


def test_the_first_bad_group_is_located() -> None:
    codes = np.zeros((4, 8, 2, 2), dtype=np.int8)
    codes[3, 4:8, 1, 0] = 1
    (finding,) = check_pattern(coded_weights(coded(codes, np.ones(4)))[0], 2, 4)
    assert finding.detail.startswith(
        "1 of 32 groups of 4 have over 2 nonzeros, the first from [3, 4, 1, 0] on along axis 1"
    )
    assert str(finding) == f"w: pattern: {finding.detail}"


def test_channels_that_are_no_multiple_of_the_group() -> None:
    (weight,) = coded_weights(coded(np.zeros((4, 6, 1, 1)), np.ones(4)))
    assert "6 input channels are no multiple of 4" in check_pattern(weight, 2, 4)[0].detail


def test_blocks_that_repeat_the_channels_scale_are_that_scale() -> None:
    codes, scale = sparse_codes(RNG, (8, 64), 4, axis=1), np.repeat(SCALE[:, None], 2, axis=1)
    trained = {"w": CodedTensor(codes, SCALE, 4, 0, (2, 4))}
    blocked = {"op": "Gemm", "axis": 1, "block_size": 32, "transB": 1}
    assert rules(coded(codes, scale, **blocked), trained) == set()
    scale[5, 1] *= 2
    assert rules(coded(codes, scale, **blocked), trained) == {"scale"}


def test_a_float_weight_needs_no_scale() -> None:
    (weight,) = coded_weights(model([node("MatMul", ["x", "w"], "y")], [tensor("w", np.ones((4, 4)), "FLOAT16")]))
    assert check_weight(weight, None, None) == []
    assert [finding.rule for finding in check_weight(weight, None, (2, 4))] == ["pattern"]


@settings(deadline=None)
@given(
    st.sampled_from([("Conv", {}, 1), ("ConvTranspose", {}, 0), ("MatMul", {}, 0), ("Gemm", {"transB": 1}, 1)]),
    st.sampled_from([(1, 4), (2, 4), (2, 8)]),
    st.integers(0, 2**32 - 1),
)
def test_the_pattern_check_agrees_with_counting(
    how: tuple[str, dict, int], pattern: tuple[int, int], seed: int
) -> None:
    op, attributes, axis = how
    rng = np.random.default_rng(seed)
    n, m = pattern
    dims = (8, 8, 2, 1) if "Conv" in op else (8, 8)
    codes = rng.integers(-2, 2, dims) * (rng.random(dims) < rng.random())
    weight = coded_weights(coded(codes, 1.0, "INT2", op, **attributes))[0]
    rows = np.moveaxis(codes, axis, -1).reshape(-1, 8)
    broken = sum(np.count_nonzero(row[i : i + m]) > n for row in rows for i in range(0, 8, m))
    findings = check_pattern(weight, n, m)
    assert bool(findings) == bool(broken)
    assert not findings or findings[0].detail.startswith(f"{broken} of ")
