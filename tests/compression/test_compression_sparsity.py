"""N:M masks against a plain sort, with ties, NaN, infinities and subnormals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.compression.sparsity import keep_largest, nm_mask

PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 8), (2, 16), (1, 2), (3, 5), (4, 4), (0, 4), (5, 32)]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, 1e-30, math.inf, -math.inf]
# Few distinct values, so that ties are the rule.
WEIGHTS = st.one_of(st.sampled_from(SPECIAL), st.floats(-2, 2, width=32))


def plain_mask(group: list[float], n: int) -> list[bool]:
    order = sorted(range(len(group)), key=lambda i: (-abs(group[i]), i))
    return [i in order[:n] for i in range(len(group))]


@st.composite
def grouped(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    n, m = draw(st.sampled_from(PATTERNS))
    shape = (draw(st.integers(1, 2)), m * draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    count = math.prod(shape)
    return torch.tensor(draw(st.lists(WEIGHTS, min_size=count, max_size=count))).view(shape), n, m


@settings(deadline=None, max_examples=80)
@given(grouped())
def test_mask_equals_a_plain_sort(case: tuple[torch.Tensor, int, int]) -> None:
    weight, n, m = case
    mask = nm_mask(weight, n, m)
    assert mask.dtype == torch.bool
    assert mask.shape == weight.shape
    for filter_ in range(weight.shape[0]):
        for start in range(0, weight.shape[1], m):
            for place in range(weight.shape[2]):
                group = weight[filter_, start : start + m, place].tolist()
                assert mask[filter_, start : start + m, place].tolist() == plain_mask(group, n)


@settings(deadline=None, max_examples=60)
@given(grouped())
def test_keep_largest_keeps_the_masked_values_and_is_idempotent(case: tuple[torch.Tensor, int, int]) -> None:
    weight, n, m = case
    kept, again = torch.empty_like(weight), torch.empty_like(weight)
    keep_largest(weight, n, m, out=kept)
    mask = nm_mask(weight, n, m)
    assert torch.equal(kept[mask].view(torch.int32), weight[mask].view(torch.int32))  # bits, so -0.0 too
    assert (kept[~mask].view(torch.int32) == 0).all()
    keep_largest(kept, n, m, out=again)
    assert torch.equal(again.view(torch.int32), kept.view(torch.int32))


def test_ties_keep_the_lower_index() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, -0.0, 0.0], [0.5, 2.0, -0.5, 0.5]])
    expected = [[True, True, False, False], [True, True, False, False], [True, True, False, False]]
    assert nm_mask(weight, 2, 4).tolist() == expected


def test_nan_is_kept_so_that_it_reaches_the_loss() -> None:
    weight = torch.tensor([[math.inf, 9.0, math.nan, 1.0], [-math.nan, math.nan, math.nan, 1.0]])
    assert nm_mask(weight, 2, 4)[0].tolist() == [True, False, True, False]
    assert nm_mask(weight, 2, 4).sum(dim=1).tolist() == [2, 2]
    kept = torch.empty_like(weight)
    keep_largest(weight, 2, 4, out=kept)
    assert kept.isnan().any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(nm_mask(weight, 2, 8), nm_mask(weight.float(), 2, 8))


def test_groups_run_along_the_input_channel_of_any_layout_and_axis() -> None:
    weight = torch.randn(3, 8, 2, 3, generator=torch.Generator().manual_seed(1))
    mask = nm_mask(weight, 2, 4)
    assert (mask.view(3, 2, 4, 2, 3).sum(dim=2) == 2).all()
    assert torch.equal(nm_mask(weight.to(memory_format=torch.channels_last), 2, 4), mask)
    assert torch.equal(nm_mask(weight.transpose(0, 1), 2, 4, axis=0), mask.transpose(0, 1))
    assert torch.equal(nm_mask(weight.movedim(1, -1), 2, 4, axis=-1), mask.movedim(1, -1))


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 3, 1), (5, 4, 1), (-1, 4, 1), (2, 4, 0), (0, 0, 1)])
def test_groups_that_do_not_fit_are_refused(n: int, m: int, axis: int) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        nm_mask(torch.zeros(3, 4), n, m, axis)
