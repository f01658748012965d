"""compress, train a step, read the codes, fold: on a small model."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from slope_compile.compression.api import codes, compress, fold, layer_statistics, masks, penalty, step_parameters
from slope_compile.compression.sparsity import nm_mask
from slope_compile.errors import ModelError, RecipeError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.hidden(self.block(self.stem(x)).mean(dim=(2, 3))).relu())


def compressed(seed: int = 0, **keys: Any) -> Net:
    torch.manual_seed(seed)
    model = Net()
    compress(model, **keys)
    return model


def descend(model: nn.Module, lr: float) -> None:
    """Plain gradient descent: torch.optim imports torch's compiler on its first step, which takes seconds."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= lr * parameter.grad
                parameter.grad = None


def train_step(model: nn.Module) -> None:
    with parametrize.cached():
        loss = model(torch.randn(4, 3, 6, 6)).square().mean() + penalty(model)
        loss.backward()
    descend(model, 0.05)


@pytest.mark.parametrize("regularizer", ["none", "l2", "sr-ste", "cosine"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_codes_equal_the_trained_weight_to_the_bit(regularizer: str, granularity: str) -> None:
    model = compressed(regularizer=regularizer, granularity=granularity, bits=3)
    start = model.block[2].parametrizations.weight.original.detach().clone()
    for _ in range(3):
        train_step(model)
    assert not torch.equal(start, model.block[2].parametrizations.weight.original)
    coded = codes(model)
    assert list(coded) == ["stem.weight", "block.2.weight", "hidden.weight", "head.weight"]
    for name, tensor in coded.items():
        tensor.check(name)
        weight = model.get_submodule(name.removesuffix(".weight")).weight
        assert torch.equal(tensor.dequantize().view(torch.int32), weight.detach().view(torch.int32))
    assert (coded["stem.weight"].bits, coded["stem.weight"].pattern) == (8, None)
    assert (coded["block.2.weight"].bits, coded["block.2.weight"].pattern) == (3, (2, 4))


def test_fold_leaves_a_plain_model_with_the_same_outputs() -> None:
    model = compressed()
    train_step(model)
    model.eval()
    x = torch.randn(2, 3, 6, 6)
    before, weights = model(x), {name: tensor.dequantize() for name, tensor in codes(model).items()}
    fold(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert type(model.stem) is nn.Conv2d
    assert set(model.state_dict()) == set(Net().state_dict())
    assert torch.equal(model(x), before)
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    assert penalty(model).item() == 0


def test_state_dict_round_trip_is_strict_and_exact() -> None:
    model = compressed()
    train_step(model)
    state = model.state_dict()
    for key in ("block.2.parametrizations.weight.original", "block.2.parametrizations.weight.0.step"):
        assert key in state
    other = compressed(seed=1)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.block[2].weight, model.block[2].weight)


def test_deep_copies_are_independent() -> None:
    model = compressed()
    twin = copy.deepcopy(model)
    before = twin.block[2].weight.detach().clone()
    train_step(model)
    assert torch.equal(twin.block[2].weight, before)
    assert not torch.equal(model.block[2].weight, before)
    train_step(twin)
    assert not torch.equal(twin.block[2].weight, before)


def test_latents_keep_their_identity_and_steps_are_told_apart() -> None:
    model = Net()
    weight = model.block[2].weight
    compress(model, granularity="channel")
    assert model.block[2].parametrizations.weight.original is weight
    steps = step_parameters(model)
    assert {id(s) for s in steps} == {id(p) for name, p in model.named_parameters() if name.endswith(".0.step")}
    assert [tuple(s.shape) for s in steps] == [(8,), (8,), (8,), (4,)]


def test_penalty_is_the_sum_over_layers_with_the_strength() -> None:
    model = compressed(regularizer="l2", strength=0.5)
    expected = 0.0
    for layer in (model.stem, model.block[2], model.hidden, model.head):
        expected += 0.5 * (layer.parametrizations.weight.original - layer.weight).square().sum().item()
    assert penalty(model).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("regularizer", "auto"), [("cosine", 0.1), ("l2", 5e-4), ("sr-ste", 2e-4)])
def test_auto_strengths(regularizer: str, auto: float) -> None:
    by_name = penalty(compressed(regularizer=regularizer)).item()
    assert by_name == penalty(compressed(regularizer=regularizer, strength=auto)).item()
    assert by_name > 0


def test_penalty_reuses_the_weight_of_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = compressed(), []
    slope = model.block[2].parametrizations.weight[0]
    forward = slope.forward
    monkeypatch.setattr(slope, "forward", lambda weight: calls.append(1) or forward(weight))
    with parametrize.cached():
        penalty(model)  # before the forward pass: what it leaves in the cache must carry gradients
        model(torch.randn(2, 3, 6, 6)).square().sum().backward()
    assert len(calls) == 1
    gradient = model.block[2].parametrizations.weight.original.grad
    assert gradient is not None and (gradient != 0).any()


def test_the_cosine_penalty_aligns() -> None:
    model = compressed(bits=2, strength=1.0)
    before = penalty(model).item()
    for _ in range(20):
        penalty(model).backward()
        descend(model, 0.5)
    assert penalty(model).item() < 0.8 * before


def test_masks_are_those_in_force() -> None:
    model = compressed()
    train_step(model)
    found = masks(model)
    assert list(found) == ["block.2", "hidden"]
    assert torch.equal(found["block.2"], nm_mask(model.block[2].parametrizations.weight.original, 2, 4))


def test_statistics_equal_plain_sums() -> None:
    model = compressed()
    statistics = layer_statistics(model)
    assert list(statistics) == ["stem", "block.2", "hidden", "head"]
    layer, row = model.hidden, statistics["hidden"]
    w, w_hat = layer.parametrizations.weight.original.tolist(), layer.weight.tolist()
    cosine, signal, noise = 0.0, 0.0, 0.0
    for a, b in zip(w, w_hat, strict=True):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        cosine += dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)) / len(w)
        signal += sum(x * x for x in a)
        noise += sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    assert row["cosine"] == pytest.approx(cosine, abs=1e-6)
    assert row["sqnr_db"] == pytest.approx(10 * math.log10(signal / noise))
    assert row["density"] == sum(x != 0 for r in w_hat for x in r) / 64
    assert row["step"] == pytest.approx(layer.parametrizations.weight[0].step.item())


def test_report_is_a_table_of_every_layer() -> None:
    report = compress(Net(), first_last_bits=None)
    assert [row.name for row in report] == ["stem", "block.2", "hidden", "head"]
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "shape", "bits", "pattern", "step", "per", "input", "why"]
    assert lines[1].split()[:3] == ["stem", "8x3x3x3", "float"]
    assert lines[2].split()[:5] == ["block.2", "8x8x3x3", "4", "2:4", "tensor"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"bits": 9}, ["compression.bits", "9"]),
        ({"pattern": "5:4"}, ["5:4"]),
        ({"regularizer": "cosin"}, ["compression.regularizer", "cosin"]),
        ({"strength": -1.0}, ["compression.strength"]),
        ({"method": "sqs"}, ["compression.method", "sqs"]),
        ({"overrides": {"hidden": {"bit": 2}}}, ["bit", "Did you mean 'bits'?"]),
        ({"overrides": {"hiden": "off"}}, ["hiden", "Did you mean 'hidden'?"]),
    ],
)
def test_bad_arguments_are_named_and_leave_the_model_alone(keys: dict[str, Any], words: list[str]) -> None:
    model = Net()
    with pytest.raises(RecipeError) as error:
        compress(model, **keys)
    for word in words:
        assert word in str(error.value)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_compressing_twice_is_refused() -> None:
    with pytest.raises(ModelError, match="compressed already"):
        compress(compressed())


def test_weights_that_are_not_finite_are_refused_before_anything_changes() -> None:
    model = Net()
    with torch.no_grad():
        model.hidden.weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="'hidden'"):
        compress(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_codes_refuse_nan_and_half_precision() -> None:
    model = compressed()
    with torch.no_grad():
        model.hidden.parametrizations.weight.original[0, 0] = math.nan
    with pytest.raises(ModelError, match=r"'hidden'.*NaN"):
        codes(model)
    with pytest.raises(ModelError, match="float16"):
        codes(compressed().half())
