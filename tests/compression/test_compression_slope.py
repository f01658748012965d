"""SLOPE's Ŵ = q(S(W)): values, gradients, and codes that are exact to the bit."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.compression.lsq import effective_step, lsq
from slope_compile.compression.slope import Slope
from slope_compile.compression.sparsity import nm_mask

EXTREMES = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-39, 1e-20, 3.4e38, -3.4e38, 1e-12]
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = st.one_of(st.sampled_from(EXTREMES), st.floats(-3, 3, width=32), ANY)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.int32)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", range(2, 9))
@settings(deadline=None, max_examples=12)
@given(
    values=st.lists(VALUES, min_size=32, max_size=32),
    pattern=st.sampled_from([None, (2, 4), (1, 4), (2, 8)]),
    factor=st.sampled_from([1.0, -1.0, 0.0, 0.37, 1e-3]),
)
def test_codes_are_exact_to_the_bit(
    bits: int,
    granularity: Literal["tensor", "channel"],
    values: list[float],
    pattern: tuple[int, int] | None,
    factor: float,
) -> None:
    weight = torch.tensor(values).view(2, 8, 1, 2)
    slope = Slope(weight, bits, pattern, granularity)
    with torch.no_grad():
        slope.step.mul_(factor)  # anywhere an optimizer may have taken it
    coded = slope.codes(weight)
    coded.check("w")
    assert coded.bits == bits
    assert coded.pattern == pattern
    assert coded.scale.shape == (2,)
    assert torch.equal(bits_of(coded.dequantize()), bits_of(slope(weight)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_gradients_are_lsq_on_survivors_and_straight_through_for_the_pruned(
    granularity: Literal["tensor", "channel"], memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 8, 3, 3, generator=generator).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(4, 8, 3, 3, generator=generator)
    slope = Slope(weight, 3, (2, 4), granularity)
    compressed = slope(weight)
    compressed.backward(upstream)

    mask = nm_mask(weight, 2, 4)
    survivors = (weight.detach() * mask).requires_grad_()
    step = slope.step.detach().clone().requires_grad_()
    expected = lsq(survivors, step, 3)
    expected.backward(upstream)
    assert torch.equal(compressed, expected)
    assert weight.grad is not None and survivors.grad is not None
    assert torch.equal(weight.grad[~mask], upstream[~mask])
    assert torch.equal(weight.grad, survivors.grad)
    assert (weight.grad == 0).any()  # some survivors are clipped
    assert slope.step.grad is not None and step.grad is not None
    assert torch.allclose(slope.step.grad, step.grad, rtol=1e-5)


def test_values_of_a_worked_example() -> None:
    weight = torch.tensor([[0.9, -0.2, 0.3, -2.6], [0.1, 0.1, 0.1, 0.1]])
    slope = Slope(weight, 2, (2, 4))
    with torch.no_grad():
        slope.step.fill_(1.0)
    # Row 0 keeps 0.9 and -2.6: round(0.9) = 1, -2.6 clips to -2. Row 1 keeps the first two of a tie: both round to 0.
    assert slope(weight).tolist() == [[1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]]
    mask = slope.mask(weight)
    assert mask is not None
    assert mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert slope.codes(weight).density == 0.25


def test_step_starts_from_the_dense_weight() -> None:
    weight = torch.tensor([[4.0, 1.0, 1.0, 2.0]])
    assert Slope(weight, 2, (2, 4)).step.item() == 4.0  # 2 * mean(4, 1, 1, 2) / sqrt(1)


def test_nan_reaches_the_weight() -> None:
    weight = torch.ones(1, 4)
    slope = Slope(weight, 4, (2, 4))
    assert slope(torch.tensor([[1.0, 2.0, 3.0, math.nan]])).isnan().any()


def test_dense_layer_has_no_mask_and_double_backward_is_refused() -> None:
    weight = torch.randn(2, 4, requires_grad=True)
    slope = Slope(weight, 8, None)
    assert slope.mask(weight) is None
    (gradient,) = torch.autograd.grad(slope(weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_scale_of_codes_is_the_step_in_use() -> None:
    weight = torch.randn(3, 4)
    slope = Slope(weight, 4, (2, 4), "tensor")
    assert slope.codes(weight).scale.tolist() == [effective_step(slope.step).item()] * 3
