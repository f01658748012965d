"""Penalties and their gradients against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from slope_compile.compression.regularizer import cosine_distance, filter_cosines, pruned_decay, squared_error
from slope_compile.compression.slope import Slope
from slope_compile.compression.sparsity import nm_mask


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    w = torch.randn(5, 8, 3, 3, generator=torch.Generator().manual_seed(3), dtype=dtype)
    w_hat = (w * nm_mask(w, 2, 4) * 3).round() / 3
    return w.requires_grad_(), w_hat


def test_cosine_is_the_mean_over_filters() -> None:
    w, w_hat = pair()
    total = 0.0
    for k in range(5):
        a, b = w[k].flatten().tolist(), w_hat[k].flatten().tolist()
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        total += 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    assert cosine_distance(w, w_hat).item() == pytest.approx(total / 5, rel=1e-12)


def test_each_filter_has_its_own_cosine() -> None:
    w, w_hat = pair(torch.float32)
    measured = filter_cosines(w, w_hat)
    assert measured.dtype == torch.float64 and not measured.requires_grad
    for k in range(5):
        a, b = w[k].flatten().tolist(), w_hat[k].flatten().tolist()
        dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
        lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(y * y for y in b))
        assert measured[k].item() == pytest.approx(dot / lengths, rel=1e-12)
    assert measured.mean().item() == pytest.approx(1 - cosine_distance(w, w_hat).item(), rel=1e-6)


def test_the_angle_of_known_filters() -> None:
    w = torch.tensor([[3.0, 4.0], [1.0, 1.0], [1e-25, 1e-25], [0.0, 0.0], [2.0, 1.0]])
    w_hat = torch.tensor([[0.0, 4.0], [5.0, 5.0], [1e-25, 0.0], [1.0, 0.0], [0.0, 0.0]])
    found = filter_cosines(w, w_hat).tolist()
    assert found[:3] == pytest.approx([0.8, 1.0, math.sqrt(0.5)], rel=1e-12)
    assert found[1] <= 1.0  # it is within its range, whatever rounding does
    assert math.isnan(found[3]) and math.isnan(found[4])  # nothing points nowhere


def test_cosine_gradient_is_the_closed_form_and_orthogonal_to_the_filter() -> None:
    w, w_hat = pair()
    (gradient,) = torch.autograd.grad(cosine_distance(w, w_hat), w)
    for k in range(5):
        u, v = w[k] / w[k].norm(), w_hat[k] / w_hat[k].norm()
        c = (u * v).sum()
        assert torch.allclose(gradient[k], -(v - c * u) / w[k].norm() / 5, rtol=1e-12)
        assert (gradient[k] * w[k]).sum().abs() < 1e-14
        pruned = w_hat[k] == 0
        assert torch.allclose(gradient[k][pruned], (c * w[k] / w[k].norm() ** 2 / 5)[pruned], rtol=1e-12)


def test_cosine_gradient_equals_finite_differences() -> None:
    w, w_hat = pair()
    assert torch.autograd.gradcheck(lambda x: cosine_distance(x, w_hat), (w,))


def test_compressed_weight_is_a_constant() -> None:
    w, w_hat = pair()
    w_hat.requires_grad_()
    cosine_distance(w, w_hat).backward()
    squared_error(w, w_hat).backward()
    assert w_hat.grad is None


def test_zero_filters_cost_nothing_and_have_finite_gradients() -> None:
    w = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1e-30, 0.0], [1.0, 0.0]], requires_grad=True)
    w_hat = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    distance = cosine_distance(w, w_hat)
    distance.backward()
    assert distance.item() == pytest.approx((1 - math.sqrt(0.5)) / 4)
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()
    assert (w.grad[:3] == 0).all()
    assert (w.grad[3] != 0).any()


def test_l2_and_its_gradient() -> None:
    w, w_hat = pair()
    distance = squared_error(w, w_hat)
    differences = [a - b for a, b in zip(w.flatten().tolist(), w_hat.flatten().tolist(), strict=True)]
    assert distance.item() == pytest.approx(sum(d * d for d in differences))
    (gradient,) = torch.autograd.grad(distance, w)
    assert torch.allclose(gradient, 2 * (w - w_hat))


def test_sr_ste_gradient_is_the_decay_of_pruned_weights() -> None:
    w, _ = pair()
    mask = nm_mask(w, 2, 4)
    (gradient,) = torch.autograd.grad(pruned_decay(w, (2, 4)), w)
    assert torch.equal(gradient, w * ~mask)
    assert pruned_decay(w, (2, 4)).item() == pytest.approx(0.5 * (w[~mask] ** 2).sum().item())
    assert pruned_decay(w, None).item() == 0


def test_autocast_keeps_the_digits_of_the_cosine() -> None:
    w, w_hat = pair(torch.float32)
    exact = cosine_distance(w, w_hat).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cosine_distance(w, w_hat).item() == exact


@pytest.mark.parametrize(("name", "per_strength"), [("cosine", cosine_distance), ("l2", squared_error)])
def test_slope_multiplies_with_the_strength(name: str, per_strength) -> None:
    w, w_hat = pair(torch.float32)
    measured = Slope(w, 4, (2, 4), "tensor", name, 0.3).penalty(w, w_hat).item()
    assert measured == pytest.approx(0.3 * per_strength(w, w_hat).item())


def test_none_costs_nothing() -> None:
    w, w_hat = pair(torch.float32)
    assert Slope(w, 4, (2, 4), "tensor", "none", 5.0).penalty(w, w_hat).item() == 0


def test_scale_of_the_cosine_for_one_layer() -> None:
    # docs/method.md: pruned weights decay at the rate λc/(K‖w‖²), kept ones are drawn to ŵ/(c r).
    w, w_hat = pair()
    rate = 0.3  # λ
    (gradient,) = torch.autograd.grad(rate * cosine_distance(w, w_hat), w)
    for k in range(5):
        energy, ratio = w[k].square().sum(), w_hat[k].norm() / w[k].norm()
        c = (w[k] * w_hat[k]).sum() / (w[k].norm() * w_hat[k].norm())
        pruned = w_hat[k] == 0
        decay = rate * c / (5 * energy)
        assert torch.allclose(gradient[k][pruned], (decay * w[k])[pruned], rtol=1e-12)
        target = w_hat[k] / (c * ratio)
        assert torch.allclose(gradient[k][~pruned], (decay * (w[k] - target))[~pruned], rtol=1e-10)


def test_the_cosine_has_no_scale_and_the_others_have() -> None:
    w, w_hat = pair()
    big = (8 * w).detach().requires_grad_()
    for penalty, power in ((cosine_distance, 0), (squared_error, 2)):
        assert penalty(big, 8 * w_hat).item() == pytest.approx(8**power * penalty(w, w_hat).item(), rel=1e-12)
    (small_step,) = torch.autograd.grad(cosine_distance(w, w_hat), w)
    (large_step,) = torch.autograd.grad(cosine_distance(big, 8 * w_hat), big)
    assert torch.allclose(large_step, small_step / 8, rtol=1e-12)
