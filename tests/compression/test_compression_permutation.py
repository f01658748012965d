"""Permutation changes no output, to the bit, and keeps more; what it cannot follow it leaves, and says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from exact_models import deit, mobilenet, resnet_basic, resnet_bottleneck, whole_numbers, without_queries
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from slope_compile.compression import permutation
from slope_compile.compression.api import compress
from slope_compile.compression.permutation import Permutation, permute_channels
from slope_compile.compression.regrouping import best_order
from slope_compile.compression.sparsity import keep_largest


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "best_order", partial(best_order, work=2**23))


def patterns(model: nn.Module, n: int = 2, m: int = 4) -> dict[str, tuple[int, int]]:
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    fit = {k: v for k, v in model.named_modules() if isinstance(v, layers) and v.weight.shape[1] % m == 0}
    return dict.fromkeys(fit, (n, m))


def kept(model: nn.Module, wanted: dict[str, tuple[int, int]]) -> float:
    total = 0.0
    for name, (n, m) in wanted.items():
        weight = model.get_submodule(name).weight.detach().contiguous()
        survivors = torch.empty_like(weight)
        keep_largest(weight, n, m, out=survivors)
        total += survivors.abs().sum().item()
    return total


def permuted(model: nn.Module, image: tuple[int, ...], n: int = 2, m: int = 4) -> Permutation:
    """Permute; prove that outputs are bit-equal, shapes and modes as before, and no magnitude is lost."""
    wanted = patterns(model, n, m)
    torch.manual_seed(1)
    x = torch.randint(-2, 3, (2, *image)).double()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    before, expected = kept(model, wanted), model(x)
    assert expected.abs().max() < 2**50  # or sums would not be exact
    result = permute_channels(model, wanted)
    assert torch.equal(model(x), expected)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert kept(model, wanted) >= before
    assert set(result.kept) | set(result.left) == set(wanted)
    assert not set(result.kept) & set(result.left)
    return result


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (resnet_basic, set()),
        (resnet_bottleneck, set()),
        (partial(resnet_bottleneck, 2, 16), set()),
        (mobilenet, {"9"}),  # it reads four pixels of a channel side by side: no group of 4 lies across channels
        (deit, {"blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1", "head"}),
    ],
    ids=["basic", "bottleneck", "grouped", "mobilenet", "deit"],
)
def test_no_output_changes(make: Callable[[], nn.Module], left: set[str]) -> None:
    model = whole_numbers(make())
    if make is deit:
        without_queries(model)
    result = permuted(model, (3, 32, 32))
    assert set(result.left) - {name for name, why in result.left.items() if "no order" in why} <= left
    assert len(result.kept) >= (2 if make is deit else 4)
    assert sum(after - before for before, after in result.kept.values()) > 0


class Drawn(nn.Module):
    """A chain of drawn steps over 8 to 24 channels, with a residual stream, concatenations and groups."""

    def __init__(self, steps: list[str]) -> None:
        super().__init__()
        self.steps, self.layers = steps, nn.ModuleList()
        width = 8
        self.stem = nn.Conv2d(3, width, 1)
        for step in steps:
            layer: nn.Module = nn.Identity()
            if step in ("conv", "residual", "shared"):
                layer = nn.Conv2d(width, width, 3, padding=1, bias=step == "conv")
            elif step == "grouped":
                layer = nn.Conv2d(width, width, 1, groups=2)
            elif step == "depthwise":
                layer = nn.Conv2d(width, width, 3, padding=1, groups=width)
            elif step == "multiplied":
                layer = nn.Conv2d(width, 2 * width, 1, groups=width) if width < 16 else nn.Conv2d(width, width, 1)
                width = layer.out_channels
            elif step == "concat":
                layer = nn.Conv2d(width, 4, 1)
                width += 4
            elif step == "norm":
                layer = nn.BatchNorm2d(width)
            elif step == "mixing":
                layer = nn.PixelShuffle(1)
            self.layers.append(layer)
        self.head = nn.Linear(4 * width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for step, layer in zip(self.steps, self.layers, strict=True):
            if step == "residual":
                x = x + layer(x).relu()
            elif step == "shared":
                x = layer(layer(x)) * 0.5
            elif step == "concat":
                x = torch.cat([layer(x), x], dim=1)
            elif step == "relu":
                x = nn.functional.relu6(x)
            else:
                x = layer(x)
            x = x.clamp(-64, 64)
        x = nn.functional.adaptive_avg_pool2d(x, 2)
        return self.head(x.view(x.size(0), -1))


STEPS = ["conv", "residual", "shared", "grouped", "depthwise", "multiplied", "concat", "norm", "relu", "mixing"]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(STEPS), max_size=7), st.integers(0, 9), st.sampled_from([(2, 4), (1, 2), (2, 8)]))
def test_no_output_of_a_drawn_net_changes(steps: list[str], seed: int, pattern: tuple[int, int]) -> None:
    permuted(whole_numbers(Drawn(steps), seed), (3, 4, 4), *pattern)


def reasons(model: nn.Module) -> dict[str, str]:
    return permute_channels(model, patterns(model)).left


def test_the_training_mode_of_every_module_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).train()
    model[2].eval()
    assert list(permute_channels(model, {"3": (2, 4)}).kept) == ["3"]
    assert [module.training for module in model] == [True, True, False, True]


def test_equal_weights_are_permuted_alike() -> None:
    model = whole_numbers(mobilenet())
    other = copy.deepcopy(model)
    assert permute_channels(model, patterns(model)) == permute_channels(other, patterns(other))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) if x.sum() > 0 else self.b(x)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.extra = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.a(x)
        return (self.b(hidden), self.extra(hidden)) if self.training else self.b(hidden)


class Raw(nn.Module):
    """Uses a weight of a layer beside the layer's own call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) + x @ self.a.weight


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self[0].register_forward_hook(lambda module, inputs, output: output.cumsum(-1))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "layer", "words"),
    [
        (Branching(), "b", "Branching cannot be traced"),
        (Auxiliary(), "b", "'extra.weight' takes no part"),
        (Raw(), "b", "not the output of layers that are followed"),
        (Hooked(), "1", "not the output of layers that are followed"),
        (tied(), "2", "shares parameters"),
        (nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)), "2", "not the output of layers"),
        (nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)), "1", "4 channels leave no other groups of 4"),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Softmax(1), nn.Conv2d(8, 8, 1)), "2", "not the output of layers"),
        (nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1, groups=2)), "1", "in each of 2 blocks"),
    ],
)
def test_what_is_not_followed_is_left_with_the_reason(model: nn.Module, layer: str, words: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert words in reasons(model)[layer]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_part_that_cannot_be_traced_is_a_barrier_and_the_rest_is_permuted() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), Branching(), nn.Linear(8, 8))
    result = permute_channels(model, patterns(model))
    assert list(result.kept) == ["2"]
    assert set(result.left) == {"0", "3.a", "3.b", "4"}


def test_compress_permutes_first_and_tells() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8, 2)).eval()
    plain = copy.deepcopy(model)
    report = compress(model, permute=True, first_last_bits=None)
    assert report.permutation is not None
    before, after = report.permutation.kept["2"]
    assert before < after
    assert "1 of 1 layers" in str(report.permutation)
    assert compress(copy.deepcopy(plain)).permutation is None
    latent = model[2].parametrizations.weight.original
    assert not torch.equal(latent, plain[2].weight)
    assert torch.equal(latent.sort(dim=1).values, plain[2].weight.sort(dim=1).values)
