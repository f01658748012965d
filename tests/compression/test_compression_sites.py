"""Which tensors of a model are quantized: by its dataflow, not by its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slope_compile.compression.api import Report, compress
from slope_compile.compression.sites import Site
from slope_compile.errors import RecipeError


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU module for both places."""

    def __init__(self, inside: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        if stride == 1:
            self.down = None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += shortcut
        return self.relu(out)


class Attention(nn.Module):
    def __init__(self, mask: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, _, width = x.shape
        scores = self.q(x) @ self.k(x).transpose(1, 2) / width**0.5
        if mask is not None:
            scores = scores + mask
        return x + self.out((scores.softmax(-1) @ self.v(x)).reshape(batch, -1, width))


class Bypassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 8, bias=False)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(self.first(x), self.hidden.weight))


class Branching(nn.Module):
    """Looks at values: torch.fx cannot trace it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.two(x)


def resnet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Block(8, 8, 1), Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def quantized(report: Report) -> dict[str, int]:
    """Modules that hold a quantizer, and its side -> bits."""
    found = [("+".join(site.modules), site.side.removesuffix("_quantizer"), site.bits) for site in report.activations]
    return {f"{modules} {side}": bits for modules, side, bits in found if bits}


def left(report: Report) -> list[Site]:
    return [site for site in report.activations if site.bits is None]


def row(report: Report, name: str) -> Any:
    return next(row for row in report if row.name == name)


def runs(model: nn.Module, x: Tensor) -> None:
    """The model trains and evaluates, and every quantizer has seen its tensor."""
    model.train()(x).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    model.eval()(x)


def test_a_residual_network_at_8_bits() -> None:
    model = resnet()
    report = compress(model, activation_bits=8)
    assert quantized(report) == {
        "0 input": 8,
        "3 input": 8,  # the block's input: its convolution and its Add read the one INT8 tensor
        "3.conv2 input": 8,
        "4.conv1+4.down.0 input": 8,
        "4.conv2 input": 8,
        "4.down.1 output": 8,
        "5 input": 8,
        "7 input": 8,
    }
    assert row(report, "3.conv1").activation_bits == 8
    assert row(report, "3.conv1").activation_reason == "quantized where it enters '3'"
    assert model[4].conv1.input_quantizer is model[4].down[0].input_quantizer
    assert not hasattr(model[3].conv1, "input_quantizer")
    assert left(report) == []
    runs(model, torch.randn(2, 3, 8, 8))


def test_4_bits_are_for_what_is_multiplied() -> None:
    model = resnet()
    overrides = {"4.conv2": {"activation_bits": None}, "3.conv2": {"bits": 2}}
    report = compress(model, activation_bits=4, overrides=overrides)
    assert quantized(report) == {
        "0 input": 8,  # first_last_bits
        "3 input": 8,
        "3.conv1 input": 4,
        "3.conv2 input": 4,
        "4.conv1+4.down.0 input": 4,
        "4.bn2 output": 8,  # the Add is the other convolution's: this operand is its residual
        "5 input": 8,
        "7 input": 8,
    }
    assert row(report, "4.conv2").activation_bits is None
    assert "  4  " in str(report)
    runs(model, torch.randn(2, 3, 8, 8))


def test_layers_that_read_one_tensor_share_a_quantizer_and_outputs_are_quantized_on_request() -> None:
    model = nn.Sequential(Attention(), nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    report = compress(model, activation_bits=8, quantize_outputs=True, first_last_bits=8)
    assert quantized(report) == {
        "0.q+0.k+0.v input": 8,
        "0.out input": 8,
        "2 input": 8,
        "4 input": 8,
        "0.q output": 8,
        "0.k output": 8,
        "0.v output": 8,
        "0.out output": 8,
    }  # not 2: its GELU's output is read as INT8; not 4: that is the model's answer
    runs(model, torch.randn(2, 5, 8))


def test_outputs_are_quantized_behind_what_fuses_with_the_layer() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Hardswish()
            self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn(self.conv(x)))
            return x * self.fc(self.pool(x)).sigmoid()

    without = compress(nn.Sequential(nn.Conv2d(3, 8, 1), Gate(), nn.Conv2d(8, 2, 1)), activation_bits=8)
    assert [(site.modules, "others read" in site.reason) for site in left(without)] == [(("1.pool",), True)]
    report = compress(
        nn.Sequential(nn.Conv2d(3, 8, 1), Gate(), nn.Conv2d(8, 2, 1)), activation_bits=8, quantize_outputs=True
    )
    assert quantized(report)["1.act output"] == 8
    assert quantized(report)["1.fc output"] == 8
    assert left(report) == []


def test_a_layer_whose_weight_is_read_past_it_keeps_a_float_input() -> None:
    model = Bypassing()
    report = compress(model, activation_bits=8)
    assert row(report, "hidden").bits == 4
    assert row(report, "hidden").activation_bits is None
    assert "never calls it" in row(report, "hidden").activation_reason
    runs(model, torch.randn(4, 8))


def test_what_cannot_be_traced_is_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Branching(), nn.Linear(8, 8))
    report = compress(model, activation_bits=8)
    assert "1.one input" in quantized(report)
    assert [site.modules for site in left(report)] == [("1",)]
    assert "TraceError" in left(report)[0].reason


def test_float_activations_attach_nothing() -> None:
    model = resnet()
    report = compress(model)
    assert report.activations == []
    assert not [name for name in model.state_dict() if "quantizer" in name]


def test_outputs_without_inputs_are_refused() -> None:
    with pytest.raises(RecipeError, match="quantize_outputs is set and activation_bits is not"):
        compress(resnet(), quantize_outputs=True)


class Fire(nn.Module):
    """One tensor through three branches, one of them behind a max pool; their activations are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.pool, self.average, self.fc = nn.MaxPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.a(x)), self.b(x).relu(), torch.relu(self.c(self.pool(x)))], 1)
        return self.fc(torch.flatten(self.average(x), 1))


class Branch(nn.Module):
    def __init__(self, inside: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inside, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.bn(self.conv(x)))


class Joined(nn.Module):
    """Two branches and, where asked for, the input itself, read by a norm: in float."""

    def __init__(self, bare: bool) -> None:
        super().__init__()
        self.a, self.b, self.bare = Branch(3), Branch(3), bare
        self.norm, self.last = nn.BatchNorm2d(19 if bare else 16), nn.Conv2d(19 if bare else 16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.cat([self.a(x), self.b(x), x] if self.bare else [self.a(x), self.b(x)], 1)))


def test_a_max_pool_shares_the_step_of_what_it_reads_and_nothing_is_quantized_twice() -> None:
    model = Fire()
    report = compress(model, activation_bits=8, quantize_outputs=True, first_last_bits=8)
    assert quantized(report) == {"stem input": 8, "a+b+c input": 8, "average input": 8, "fc input": 8}
    runs(model, torch.randn(2, 3, 8, 8))


def test_an_average_pool_shares_the_quantizer_of_the_layers_beside_it() -> None:
    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.one = nn.Conv2d(8, 8, 3, 2, 1), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.one(self.pool(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Down(), nn.Conv2d(8, 2, 1))
    report = compress(model, activation_bits=8)
    assert quantized(report) == {"0 input": 8, "1.conv+1.pool input": 8, "1.one input": 8, "2 input": 8}
    assert left(report) == []
    narrow = compress(nn.Sequential(nn.Conv2d(3, 8, 1), Down(), nn.Conv2d(8, 2, 1)), activation_bits=4)
    assert [site.modules for site in left(narrow)] == [("1.pool",)]
    runs(model, torch.randn(2, 3, 8, 8))


def test_operands_of_a_concatenation_share_a_quantizer_behind_their_activations() -> None:
    model = Joined(bare=False)
    report = compress(model, activation_bits=8, quantize_outputs=True)
    assert quantized(report) == {"a.conv+b.conv input": 8, "last input": 8, "a+b output": 8}
    assert model.a.output_quantizer is model.b.output_quantizer
    runs(model, torch.randn(2, 3, 8, 8))


def test_a_concatenation_with_a_float_stays_float() -> None:
    report = compress(Joined(bare=True), activation_bits=8, quantize_outputs=True)
    assert quantized(report) == {"a.conv+b.conv input": 8, "last input": 8}
    assert {site.modules for site in left(report)} == {("a",), ("b",)}
    assert all("cannot share its step" in site.reason for site in left(report))


def test_no_quantizer_stands_between_a_convolution_and_a_relu_that_is_a_function() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.relu(self.conv(x)) * 2)

    report = compress(Summed(), activation_bits=8, quantize_outputs=True)
    assert quantized(report) == {"conv input": 8, "last input": 8}
    (site,) = left(report)
    assert "a function fuses with it" in site.reason
