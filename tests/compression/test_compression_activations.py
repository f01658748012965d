"""The quantizer of activations: LSQ's values and gradients, its first step, its sign, its state."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slope_compile.compression.activations import (
    INPUT,
    OBSERVED_CALLS,
    ActivationQuantizer,
    activation_bounds,
    attach,
    trained_quantizers,
)
from slope_compile.compression.api import compress, fold, penalty, step_parameters
from slope_compile.errors import ModelError


def quantizer(bits: int, signed: bool, step: float) -> ActivationQuantizer:
    """One whose range is settled, with the step given."""
    made = ActivationQuantizer(bits)
    with torch.no_grad():
        made.calls.fill_(OBSERVED_CALLS)
        made.signed.fill_(signed)
        made.step.fill_(step)
    return made


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [(8, True, (128, 127)), (4, True, (8, 7)), (2, True, (2, 1)), (8, False, (0, 127)), (7, False, (0, 127)),
     (4, False, (0, 15)), (2, False, (0, 3))],
)  # fmt: skip
def test_ranges_fit_int8(bits: int, signed: bool, expected: tuple[int, int]) -> None:
    assert activation_bounds(bits, signed) == expected


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8), signed=st.booleans(), step=st.floats(1e-3, 10), seed=st.integers(0, 9), turn=st.booleans()
)
def test_values_and_gradients_follow_the_paper(bits: int, signed: bool, step: float, seed: int, turn: bool) -> None:
    qn, qp = activation_bounds(bits, signed)
    module = quantizer(bits, signed, -step if turn else step)
    rng = np.random.default_rng(seed)
    v = (rng.normal(size=(3, 4, 5)) * step * qp).astype(np.float32)
    upstream = rng.normal(size=v.shape).astype(np.float32)
    x = torch.tensor(v, requires_grad=True)
    made = module(x)
    made.backward(torch.tensor(upstream))
    s = np.float32(step) + np.float32(1e-12)
    ratio = v / s
    inside = (ratio > -qn) & (ratio < qp)
    np.testing.assert_array_equal(made.detach().numpy(), np.rint(np.clip(ratio, -qn, qp)) * s)
    np.testing.assert_array_equal(x.grad.numpy(), np.where(inside, upstream, 0))
    slope = np.where(inside, np.rint(ratio) - ratio, np.where(ratio <= -qn, -qn, qp))
    # N: 20 features of each of 3 items
    expected = float((slope.astype(np.float64) * upstream).sum()) / math.sqrt(20 * qp) * (-1 if turn else 1)
    assert module.step.grad.item() == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_first_batches_set_step_and_sign_and_later_ones_do_not() -> None:
    module = ActivationQuantizer(4)
    batches = [torch.rand(4, 6) * (index + 1) for index in range(OBSERVED_CALLS)]
    for number, batch in enumerate(batches, start=1):
        module(batch)
        mean = torch.stack([b.mean() for b in batches[:number]]).mean()
        assert module.step.item() == pytest.approx(2 * mean.item() / math.sqrt(15), rel=1e-5)
    settled = module.step.item()
    module(-100 * torch.rand(4, 6))
    assert (module.step.item(), bool(module.signed), module.levels()) == (settled, False, (0, 15))


def test_a_negative_value_in_the_first_batches_makes_it_signed() -> None:
    module = ActivationQuantizer(4)
    module(torch.tensor([[1.0, 3.0]]))
    module(torch.tensor([[-2.0, 2.0]]))
    assert module.levels() == (8, 7)
    assert module.step.item() == pytest.approx(2 * 2 / math.sqrt(7))


def test_zeros_and_empty_batches_say_nothing() -> None:
    module = ActivationQuantizer(8)
    for batch in (torch.zeros(2, 3), torch.zeros(0, 3)):
        assert torch.equal(module(batch), batch)
    assert int(module.calls) == 0
    assert torch.equal(module.eval()(torch.zeros(2, 3)), torch.zeros(2, 3))


def test_evaluation_before_any_batch_is_refused() -> None:
    with pytest.raises(ModelError, match="seen no batch"):
        ActivationQuantizer(8).eval()(torch.ones(1, 2))


def test_half_types_are_quantized_in_float32() -> None:
    v = torch.linspace(-3, 3, 101).bfloat16().view(1, -1)
    module = quantizer(8, True, 0.013)
    made = module(v)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, module(v.float()).bfloat16())


def test_a_quantizer_that_is_called_twice_before_backward() -> None:
    module = ActivationQuantizer(8)  # each of its first calls sets the step: the other call's gradient must not mind
    x = torch.randn(2, 4, requires_grad=True)
    (module(x) + module(2 * x)).sum().backward()
    assert torch.isfinite(module.step.grad)


def test_channels_last_stays_channels_last() -> None:
    v = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    assert quantizer(4, True, 0.1)(v).is_contiguous(memory_format=torch.channels_last)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def steps(model: nn.Module, first: int, last: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in range(first, last):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(index))
        optimizer.zero_grad()
        (model(x).square().mean() + penalty(model)).backward()
        optimizer.step()


@pytest.mark.parametrize("cut", [3, OBSERVED_CALLS + 1])
def test_a_state_dict_goes_on_bit_for_bit(cut: int) -> None:
    whole, first, second = net(), net(), net()
    for model in (whole, first, second):
        compress(model, bits=4, activation_bits=4)
    steps(whole, 0, 12)
    steps(first, 0, cut)
    with torch.no_grad():  # in place, tensor by tensor, as a training state is restored
        for name, tensor in first.state_dict().items():
            second.state_dict()[name].copy_(tensor)
    steps(second, cut, 12)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name
    assert "2.input_quantizer.step" in whole.state_dict()


def test_load_state_dict_brings_the_sign_of_a_settled_quantizer() -> None:
    one, other = quantizer(4, True, 0.5), quantizer(4, False, 0.5)
    other(torch.ones(1, 1))  # settles
    other.load_state_dict(one.state_dict())
    assert other(torch.tensor([[-1.0]])).item() == -1.0


def test_copies_folding_and_steps() -> None:
    model = net()
    compress(model, activation_bits=8)
    steps(model, 0, 2)
    model.eval()
    x = torch.randn(3, 8)
    expected = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter("0.input_quantizer.step").mul_(3)
    assert not torch.equal(twin(x), expected)  # the copy's hook works with the copy's quantizer
    assert torch.equal(model(x), expected)
    assert len(step_parameters(model)) == 6
    fold(model)
    assert torch.equal(model(x), expected)
    assert list(trained_quantizers(model)) == ["0.input", "2.input", "4.input"]


def test_an_input_given_by_name_is_quantized_too() -> None:
    layer = nn.Linear(2, 2)
    attach({"layer": layer}, quantizer(2, True, 1.0), INPUT)
    assert torch.equal(layer(input=torch.full((1, 2), 9.0)), layer(torch.full((1, 2), 1.0)))


def test_a_taken_name_and_a_damaged_step_are_refused() -> None:
    layer = nn.Linear(2, 2)
    layer.input_quantizer = nn.Identity()
    with pytest.raises(ModelError, match="'layer' already has an attribute 'input_quantizer'"):
        attach({"layer": layer}, quantizer(2, True, 1.0), INPUT)
    broken = nn.Sequential(nn.Linear(2, 2))
    attach({"0": broken[0]}, quantizer(4, True, math.nan), INPUT)
    with pytest.raises(ModelError, match=r"'0\.input' is nan"):
        trained_quantizers(broken)
