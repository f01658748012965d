"""LSQ against the paper's piecewise formulas, written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.compression.lsq import SMALLEST_STEP, bounds, effective_step, lsq, step_init


def reference(v: float, s: float, bits: int) -> tuple[float, float, float]:
    """Value, dv̂/dv and dv̂/ds of eq. 1, 2, 3 and 5."""
    qn, qp = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    ratio = v / s
    if ratio <= -qn:
        return -qn * s, 0.0, float(-qn)
    if ratio >= qp:
        return qp * s, 0.0, float(qp)
    return round(ratio) * s, 1.0, round(ratio) - ratio


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**32 - 1))
def test_values_and_gradients_follow_the_paper(bits: int, per_channel: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    qn, qp = bounds(bits)
    v = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64) * qp
    steps = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    step = steps if per_channel else steps[0]
    v[0, 0, 0], v[0, 1, 0] = qp * (steps[0] + SMALLEST_STEP), -qn * (steps[0] + SMALLEST_STEP)  # exactly on the ends
    upstream = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    v.requires_grad_()
    step = step.clone().requires_grad_()
    out = lsq(v, step, bits)
    out.backward(upstream)

    count = 8 if per_channel else 24
    expected_step = [0.0, 0.0, 0.0]
    for k, c, r in [(k, c, r) for k in range(3) for c in range(4) for r in range(2)]:
        s = steps[k if per_channel else 0].item() + SMALLEST_STEP
        value, by_v, by_s = reference(v[k, c, r].item(), s, bits)
        g = upstream[k, c, r].item()
        assert out[k, c, r].item() == pytest.approx(value, rel=1e-12)
        assert v.grad is not None
        assert v.grad[k, c, r].item() == by_v * g
        expected_step[k if per_channel else 0] += g * by_s / math.sqrt(count * qp)
    assert step.grad is not None
    assert step.grad.tolist() == pytest.approx(expected_step if per_channel else expected_step[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
def test_initial_step(bits: int) -> None:
    weight = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(bits))
    qp = 2 ** (bits - 1) - 1
    rows = [[abs(x) for x in row.flatten().tolist()] for row in weight]
    per_channel = [2 * sum(row) / len(row) / math.sqrt(qp) for row in rows]
    assert step_init(weight, bits, "channel").tolist() == pytest.approx(per_channel, rel=1e-6)
    assert step_init(weight, bits, "tensor").item() == pytest.approx(sum(per_channel) / 4, rel=1e-6)
    assert step_init(weight, bits, "tensor").shape == ()


def test_initial_step_of_zeros_is_useful() -> None:
    weight = torch.zeros(2, 4)
    weight[0] = 1.0
    assert step_init(weight, 2, "channel").tolist() == [2.0, 1.0]  # the zero channel: the tensor's mean, 2 * 0.5
    assert step_init(torch.zeros(2, 4), 2, "tensor").item() == 0.5  # 2 * 1 / (2 sqrt(4))


@pytest.mark.parametrize("bits", [2, 8])
def test_initial_step_of_huge_weights_keeps_every_level_finite(bits: int) -> None:
    step = step_init(torch.full((2, 4), 3.4e38), bits, "channel")
    assert torch.isfinite(step * 2 ** (bits - 1)).all()


@pytest.mark.parametrize("parameter", [-0.5, 0.0, -0.0, 1e-20, 0.25])
def test_the_step_in_use_is_positive_and_its_gradient_follows_the_parameter(parameter: float) -> None:
    step = torch.tensor(parameter, requires_grad=True)
    assert effective_step(step).item() > 0
    v = torch.tensor([[0.3, 0.9], [-0.2, 0.05]])
    lsq(v, step, 4).sum().backward()
    assert step.grad is not None
    positive = torch.tensor(abs(parameter), requires_grad=True)
    lsq(v, positive, 4).sum().backward()
    assert positive.grad is not None
    assert positive.grad.item() != 0
    assert step.grad.item() == (-positive.grad.item() if parameter < 0 else positive.grad.item())


def test_no_negative_zero() -> None:
    out = lsq(torch.tensor([-0.1, -0.0, 0.1]), torch.tensor(1.0), 4)
    assert (out.view(torch.int32) == 0).all()


def test_nan_stays_nan() -> None:
    assert lsq(torch.tensor([math.nan, 1.0]), torch.tensor(1.0), 4).isnan().tolist() == [True, False]


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits"):
        lsq(torch.zeros(2, 2), torch.tensor(1.0), bits)


def test_a_step_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\)"):
        lsq(torch.zeros(2, 2), torch.ones(3), 4)
