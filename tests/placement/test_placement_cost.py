from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from placement_models import SITUATIONS, situation

from slope_compile.placement.cost import DEQUANTIZATION, cost, is_fused
from slope_compile.placement.layers import Layer
from slope_compile.placement.rules import PLACEMENTS, possible, sparse_doubt, storage


def layer(**changes: Any) -> Layer:
    """A 4-bit 2:4 matrix of 512 x 1024 over 10 tokens, activations float, one scale per channel."""
    facts: dict[str, Any] = {
        "name": "fc.weight", "op": "MatMul", "shape": (512, 1024), "stored": "INT4", "bits": 4, "sparse": True,
        "groups": 1, "kernel": (), "reduction": 512, "channels": 1024, "positions": 10, "positions_known": True,
        "inputs": 5120, "outputs": 10240, "quantized_input": False, "any_quantized_input": False,
        "quantized_output": False, "zero_points": False, "per_row": True, "block_size": 0,
        "blocks": frozenset({64, 128}), "plain": True, "opset": 21,
    }  # fmt: skip
    return Layer(**(facts | changes))


def convolution(channels: int = 256, side: int = 14, **changes: Any) -> Layer:
    facts: dict[str, Any] = {
        "name": "conv.weight", "op": "Conv", "shape": (channels, channels, 3, 3), "kernel": (3, 3),
        "reduction": channels * 9, "channels": channels, "positions": side * side, "inputs": channels * side * side,
        "outputs": channels * side * side, "blocks": frozenset(), "plain": False,
    }  # fmt: skip
    return layer(**(facts | changes))


INT8 = {"quantized_input": True, "any_quantized_input": True, "quantized_output": True}
LAYERS = st.builds(
    lambda conv, quantized, sparse, size: replace(
        convolution(size) if conv else layer(shape=(size, 1024), reduction=size),
        sparse=sparse,
        **(INT8 if quantized else {}),
    ),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from([4, 64, 100, 256, 512]),
)  # fmt: skip


@given(LAYERS, st.sampled_from(SITUATIONS), st.integers(1, 256), st.integers(1, 256))
def test_more_images_never_cost_less(one: Layer, where: Any, batch: int, more: int) -> None:
    for placement in possible(one, where):
        few = cost(placement, one, replace(where, batch=batch))
        many = cost(placement, one, replace(where, batch=batch + more))
        assert many.seconds >= few.seconds and many.moved > few.moved
        assert many.weight == few.weight


@given(LAYERS, st.sampled_from(SITUATIONS), st.integers(1, 64), st.floats(1, 8))
def test_a_faster_target_never_costs_more(one: Layer, where: Any, batch: int, factor: float) -> None:
    target = where.target
    better = target.model_copy(update={
        "bandwidth_gbs": target.bandwidth_gbs * factor,
        "tflops": {name: figure * factor for name, figure in target.tflops.items()},
    })  # fmt: skip
    for placement in possible(one, where):
        slow = cost(placement, one, replace(where, batch=batch))
        fast = cost(placement, one, replace(where, target=better, batch=batch))
        assert fast.seconds == pytest.approx(slow.seconds / factor)
        assert fast.bound == slow.bound or fast.memory_s == pytest.approx(fast.compute_s)


@given(LAYERS, st.sampled_from(SITUATIONS), st.integers(1, 64), st.integers(1, 8))
def test_more_bytes_of_activations_never_cost_less(one: Layer, where: Any, batch: int, factor: int) -> None:
    wide = replace(one, inputs=one.inputs * factor, outputs=one.outputs * factor)
    for placement in possible(one, where):
        here = replace(where, batch=batch)
        assert cost(placement, wide, here).memory_s >= cost(placement, one, here).memory_s
        assert cost(placement, wide, here).compute_s == cost(placement, one, here).compute_s


@given(LAYERS, st.sampled_from(SITUATIONS), st.integers(1, 64))
def test_what_must_hold_among_placements(one: Layer, where: Any, batch: int) -> None:
    here = replace(where, batch=batch)
    costs = {placement: cost(placement, one, here) for placement in possible(one, here)}
    assert "float" in costs
    for first, second in (("sparse-int8", "int8"), ("sparse-fp16", "float")):
        if first in costs and second in costs:
            assert costs[first].seconds <= costs[second].seconds
            doubt = sparse_doubt(first, one, here)  # type: ignore[arg-type]
            assert (costs[first].seconds == costs[second].seconds) or doubt is None
    if "int8" in costs:
        assert costs["int8"].seconds <= costs["float"].seconds


def test_the_roofline_by_hand() -> None:
    """The equations of the module, worked out for one layer on an A100: 312 FP16 TFLOPS, 2039 GB/s."""
    where = situation(batch=4)
    found = cost("float", layer(), where)
    assert found.moved == 2 * 512 * 1024 + 4 * 2 * (5120 + 10240)
    assert found.memory_s == pytest.approx(found.moved / 2039e9)
    assert found.compute_s == pytest.approx(2 * 4 * 10 * 512 * 1024 / 312e12)
    assert (found.bound, found.weight) == ("memory", 2 * 512 * 1024)
    sparse = cost("sparse-fp16", layer(), where)
    assert sparse.moved == found.moved - 2 * 512 * 1024 * 7 // 16
    assert sparse.compute_s == pytest.approx(found.compute_s / 2)
    unfused = cost("int8-weight", layer(), where)
    assert unfused.weight == 512 * 1024 + 4 * 1024
    assert unfused.moved == unfused.weight + 2 * 2 * 512 * 1024 + 4 * 2 * (5120 + 10240)
    fused = cost("int4-weight", layer(), where)  # FP32 arithmetic: TF32 at 156, activations of 4 bytes
    assert fused.weight == 512 * 1024 // 2 + 4 * 4 * 1024
    assert fused.moved == fused.weight + 4 * 4 * (5120 + 10240)
    assert fused.compute_s == pytest.approx(DEQUANTIZATION * 2 * 4 * 10 * 512 * 1024 / 156e12)
    quantized = cost("int8", layer(**INT8), where)
    assert quantized.moved == 512 * 1024 + 4 * 1024 + 4 * (5120 + 10240)
    assert quantized.compute_s == pytest.approx(2 * 4 * 10 * 512 * 1024 / 624e12)


def test_padding_is_paid_for() -> None:
    short, whole = layer(shape=(100, 1024), reduction=100), layer(shape=(128, 1024), reduction=128)
    where = situation()
    assert storage("int4-weight", short, where) == ("INT4", 64)
    assert cost("int4-weight", short, where) == cost("int4-weight", whole, where)


def test_why_int4_loses_at_big_batches() -> None:
    """Model Optimizer's benchmarks on an H200: INT4 is 1.33 times as fast as FP16 at batch 1, 0.83 times at 64."""
    head = layer(positions=1, inputs=512, outputs=1024)
    one, many = situation(precision="fp32"), situation(precision="fp32", batch=4096)
    assert cost("int4-weight", head, one).seconds < cost("float", head, one).seconds
    assert cost("int4-weight", head, many).compute_s > cost("float", head, many).compute_s


@pytest.mark.parametrize(
    ("placement", "one", "where", "said"),
    [
        ("sparse-int8", convolution(**INT8), situation(), None),
        ("sparse-int8", convolution(**INT8), situation(backend="tensorrt-rtx"), "at run time"),
        ("sparse-int8", convolution(**INT8 | {"quantized_output": False}), situation(), "leaves in float"),
        ("sparse-int8", convolution(64, **INT8), situation(), "576 products a sum and 64 output channels"),
        ("sparse-fp16", layer(), situation(), None),
        ("sparse-fp16", layer(), situation(precision="bf16"), "BF16"),
        ("sparse-fp16", layer(reduction=128), situation(), "128 products"),
    ],
)
def test_sparse_kernels_are_counted_on_where_likely(placement: Any, one: Layer, where: Any, said: str | None) -> None:
    doubt = sparse_doubt(placement, one, where)
    assert doubt is None if said is None else (doubt is not None and said in doubt.reason and doubt.source)
    assert cost(placement, one, where).sparse is (said is None)


def test_what_is_fused() -> None:
    rtx, tensorrt = situation(backend="tensorrt-rtx"), situation()
    assert is_fused("int4-weight", layer(), tensorrt) and is_fused("int4-weight", layer(), rtx)
    assert not is_fused("int8-weight", layer(), tensorrt) and is_fused("int8-weight", layer(), rtx)
    assert not is_fused("int4-weight", layer(shape=(64, 8), reduction=64, blocks=frozenset({64})), rtx)
    assert not any(is_fused(placement, convolution(), rtx) for placement in PLACEMENTS)
