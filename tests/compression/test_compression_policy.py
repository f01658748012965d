"""Every layer gets a row, a treatment and a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from slope_compile.compression.policy import LayerPlan, plan
from slope_compile.errors import ModelError, RecipeError
from slope_compile.recipe import CompressionSection


def rows(model: nn.Module, **keys: Any) -> dict[str, LayerPlan]:
    return {row.name: row for row in plan(model, CompressionSection(**keys))}


def treatment(row: LayerPlan) -> tuple[Any, Any, Any]:
    return row.bits, row.pattern, row.granularity


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),  # 0 first
        nn.Conv2d(8, 8, 3),  # 1
        nn.Conv2d(8, 8, 3, groups=8),  # 2 depthwise
        nn.Conv2d(8, 8, 3, groups=4),  # 3 grouped: 2 channels a filter
        nn.Conv2d(8, 6, 1),  # 4
        nn.Conv2d(6, 8, 1),  # 5 not divisible
        nn.ConvTranspose2d(8, 8, 2),  # 6
        nn.Flatten(),
        nn.Linear(8, 8),  # 8
        nn.Linear(8, 2),  # 9 last
    )


def test_every_layer_gets_its_row_in_order() -> None:
    table = rows(small())
    assert list(table) == ["0", "1", "2", "3", "4", "5", "6", "8", "9"]
    assert treatment(table["0"]) == (8, None, "tensor")
    assert "first convolution" in table["0"].reason
    assert treatment(table["1"]) == (4, (2, 4), "tensor")
    assert (table["1"].kind, table["1"].shape) == ("conv", (8, 8, 3, 3))
    assert treatment(table["2"]) == (4, None, "tensor")
    assert "depthwise, 1 input channel a filter, not divisible by 4" in table["2"].reason
    assert treatment(table["3"]) == (4, None, "tensor")
    assert "2 input channels a filter, not divisible by 4" in table["3"].reason
    assert treatment(table["4"]) == (4, (2, 4), "tensor")
    assert treatment(table["5"]) == (4, None, "tensor")
    assert "6 input channels" in table["5"].reason
    assert treatment(table["6"]) == (None, None, None)
    assert "transposed" in table["6"].reason
    assert (table["8"].kind, treatment(table["8"])) == ("linear", (4, (2, 4), "tensor"))
    assert treatment(table["9"]) == (8, None, "tensor")
    assert "last linear" in table["9"].reason
    assert all(row.reason for row in table.values())


def test_first_and_last_in_float() -> None:
    table = rows(small(), first_last_bits=None)
    assert treatment(table["0"]) == treatment(table["9"]) == (None, None, None)
    assert "left in float" in table["0"].reason


def test_pattern_none_is_dense_everywhere() -> None:
    table = rows(small(), pattern=None, bits=3, granularity="channel")
    assert treatment(table["1"]) == treatment(table["2"]) == (3, None, "channel")
    assert "divisible" not in table["2"].reason


def test_wide_patterns_need_whole_groups() -> None:
    model = nn.Sequential(nn.Linear(24, 8), nn.Linear(16, 8), nn.Linear(8, 2))
    table = rows(model, pattern="2:16")
    assert table["0"].pattern is None and "24 input channels" in table["0"].reason
    assert table["1"].pattern == (2, 16)


def test_a_model_without_linear_layers_ends_in_a_convolution() -> None:
    table = rows(nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3), nn.Conv1d(8, 2, 1)))
    assert [row.bits for row in table.values()] == [8, 4, 8]
    assert "last convolution" in table["2"].reason
    assert rows(nn.Conv3d(4, 4, 1))[""].bits == 8


def test_overrides() -> None:
    overrides = {
        "*": {"granularity": "channel"},
        "1": {"bits": 2, "pattern": "1:4"},
        "4": "off",
        "5": {"pattern": "1:3"},
        "8": {"pattern": "none"},
        "0": {"bits": 4},
    }
    table = rows(small(), overrides=overrides)
    assert treatment(table["1"]) == (2, (1, 4), "channel")
    assert treatment(table["4"]) == (None, None, None)
    assert "override '4'" in table["4"].reason
    assert treatment(table["5"]) == (4, (1, 3), "channel")
    assert treatment(table["8"]) == (4, None, "channel")
    assert treatment(table["0"]) == (4, None, "channel")
    assert treatment(table["9"]) == (8, None, "channel")


def test_an_override_can_bring_back_a_float_edge_or_what_an_earlier_one_turned_off() -> None:
    model = small()
    table = rows(model, first_last_bits=None, overrides={"9": {"bits": 8}, "[14]": "off", "1": {"bits": 3}})
    assert table["9"].bits == 8
    assert table["4"].bits is None
    assert treatment(table["1"]) == (3, None, "tensor")


def test_unquoted_pattern_of_an_override_is_read_as_meant() -> None:
    assert rows(small(), overrides={"1": {"pattern": 2 * 60 + 8}})["1"].pattern == (2, 8)


def test_an_override_that_matches_nothing_names_the_nearest_layer() -> None:
    model = nn.Sequential()
    model.add_module("stem", nn.Conv2d(3, 8, 3))
    model.add_module("block1", nn.Conv2d(8, 8, 3))
    with pytest.raises(RecipeError, match=r"'blok1'.*Did you mean 'block1'"):
        rows(model, overrides={"blok1": "off"})


def test_tied_weights_stay_in_float() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "mid": nn.Linear(8, 8), "out": nn.Linear(8, 10)})
    model["out"].weight = model["embed"].weight
    table = rows(model)
    assert table["mid"].pattern == (2, 4)
    assert table["out"].bits is None and "shared" in table["out"].reason


def test_attention_internals_stay_in_float_and_its_neighbours_do_not() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    table = rows(model)
    assert table["0.self_attn.out_proj"].bits is None
    assert "MultiheadAttention" in table["0.self_attn.out_proj"].reason
    assert table["0.linear1"].pattern == (2, 4)


def test_other_weights_that_are_not_ours_to_replace() -> None:
    class StdConv2d(nn.Conv2d):
        pass

    computed, half = weight_norm(nn.Conv2d(8, 8, 1)), nn.Linear(8, 8).half()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), StdConv2d(8, 8, 1), computed, half, nn.Linear(8, 2))
    table = rows(model)
    assert [row.bits for row in table.values()] == [8, None, None, None, 8]
    assert "standardizes" in table["1"].reason
    assert "already computed" in table["2"].reason
    assert "float16" in table["3"].reason


def test_subclasses_count_as_their_base() -> None:
    class Mine(nn.Linear):
        pass

    assert rows(nn.Sequential(Mine(8, 8), nn.Linear(8, 2)))["0"].pattern == (2, 4)


@pytest.mark.parametrize(
    ("model", "keys", "words"),
    [
        (nn.Sequential(nn.ReLU()), {}, ["Sequential", "no convolution"]),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 1)), {}, ["transposed"]),
        (nn.Linear(4, 4), {"first_last_bits": None}, ["left in float"]),
        (nn.Sequential(nn.LazyLinear(4)), {}, ["'0'", "lazy"]),
    ],
)
def test_a_model_that_cannot_be_compressed_says_why(model: nn.Module, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ModelError) as error:
        rows(model, **keys)
    for word in words:
        assert word in str(error.value)


def test_planning_changes_nothing() -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows(model)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_matrices_that_are_no_layer_get_a_row_and_a_reason() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing, self.position = nn.Parameter(torch.zeros(8, 4)), nn.Parameter(torch.zeros(1, 8, 4))
            self.scale, self.norm = nn.Parameter(torch.zeros(8, 1, 1)), nn.LayerNorm((4, 4))

    parts = {"embed": nn.Embedding(10, 8), "lstm": nn.LSTM(8, 8), "attn": nn.MultiheadAttention(8, 2), "mine": Mine()}
    table = rows(nn.ModuleDict({**parts, "mid": nn.Linear(8, 8), "out": nn.Linear(8, 2)}))
    others = {name: row.reason for name, row in table.items() if row.kind == "other"}
    assert list(others) == ["embed", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "attn.in_proj_weight", "mine.mixing"]
    assert all(treatment(table[name]) == (None, None, None) for name in others)
    assert "nn.Embedding looks rows up" in others["embed"]
    assert "nn.LSTM" in others["lstm.weight_hh_l0"]
    assert "nn.MultiheadAttention" in others["attn.in_proj_weight"]
    assert "a parameter of Mine" in others["mine.mixing"]
    assert table["lstm.weight_ih_l0"].shape == (32, 8)


def test_strict_names_every_layer_that_cannot_be_compressed() -> None:
    model = small().append(nn.Embedding(10, 8)).append(nn.Linear(8, 8).half()).append(nn.Linear(8, 2))
    with pytest.raises(ModelError) as error:
        rows(model, strict=True)
    assert "3 layer(s)" in str(error.value)
    for words in ("'6': transposed", "'10': nn.Embedding", "'11': its weight is float16"):
        assert words in str(error.value)
    overrides = {"6": "off", "1[01]": "off", "4": "off"}
    table = rows(model, strict=True, first_last_bits=None, overrides=overrides)
    assert table["4"].bits is None  # by choice, like the first and the last layer
    assert table["5"].pattern is None  # its pattern does not fit, but its bits do


def test_strict_and_permute_need_a_graph() -> None:
    class Branching(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = Branching(nn.Linear(8, 8), nn.Linear(8, 8))
    assert rows(model, permute=True)["0"].pattern == (2, 4)
    with pytest.raises(ModelError, match=r"strict: no channel can be permuted: Branching cannot be traced"):
        rows(model, permute=True, strict=True)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("2:8", "2:8 reaches sparse kernels as 2:4"),
        ("2:16", "2:16 reaches sparse kernels as 2:4"),
        ("1:2", "1:2 reaches sparse kernels as 2:4"),
        ("4:8", "4:8 is for studies of accuracy: sparse kernels know 2:4 only"),
        ("2:2", "2:2 is for studies of accuracy"),
        ("2:4", None),
        (None, None),
    ],
)
def test_the_reason_says_what_sparse_kernels_make_of_the_pattern(pattern: str | None, words: str | None) -> None:
    reason = rows(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)), pattern=pattern)["0"].reason
    assert words in reason if words else reason == "the general rule"
