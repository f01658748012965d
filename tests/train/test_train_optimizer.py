from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from slope_compile.recipe import TrainSection
from slope_compile.train.optimizer import lr_at, make_optimizer, split_parameters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm([4, 6, 6])  # two-dimensional and more, and still a norm
        self.position = nn.Parameter(torch.zeros(1, 5, 4))

    def no_weight_decay(self) -> set[str]:
        return {"position"}


def test_biases_norms_and_exempt_parameters_are_spared() -> None:
    model = Net()
    decayed, spared = split_parameters(model)
    assert [id(p) for p in decayed] == [id(model.conv.weight)]
    assert {id(p) for p in spared} == {
        id(p) for p in (model.conv.bias, model.norm.weight, model.norm.bias, model.position)
    }


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_weight_decay_moves_only_what_it_should(name: str) -> None:
    model = Net()
    optimizer = make_optimizer(model, TrainSection(optimizer=name, weight_decay=0.5, lr=0.1))  # type: ignore[arg-type]
    before = {key: value.clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {"conv.weight"}
    # Nesterov adds the momentum of the same gradient once more; AdamW's decay is lr * weight_decay.
    factor = 1 - 0.1 * 0.5 * (1.9 if name == "sgd" else 1)
    torch.testing.assert_close(model.conv.weight, before["conv.weight"] * factor)


def test_the_learning_rate_warms_up_then_follows_a_cosine() -> None:
    rates = [lr_at(step, 100, 10, 0.4) for step in range(100)]
    assert rates[:10] == pytest.approx([0.04 * (k + 1) for k in range(10)])
    assert rates[10] == 0.4
    assert rates[55] == pytest.approx(0.2)  # half way down
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 0.4 * (math.pi / 90) ** 2
    assert lr_at(0, 1, 0, 0.4) == 0.4
    assert lr_at(4, 5, 5, 0.4) == 0.4  # nothing but warm-up
