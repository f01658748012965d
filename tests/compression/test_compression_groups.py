"""Counting in blocks says what counting at once says, in any layout, and holds no more than a block."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.compression import groups
from slope_compile.compression.codes import group_nonzeros
from slope_compile.compression.groups import BLOCK, blocks, count_groups


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_blocks_count_like_the_whole(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 4))
    shape = data.draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    axis, m = data.draw(st.integers(0, rank - 1)), data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    n, most = data.draw(st.integers(0, m)), data.draw(st.sampled_from([1, 8, 64, BLOCK]))
    shape[axis] *= m
    order = data.draw(st.permutations(range(rank)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    stored = rng.integers(-1, 2, [shape[a] for a in order], dtype=np.int8)
    array = stored.transpose(np.argsort(order))  # a view, as a Transpose of the graph makes it
    counts = group_nonzeros(array, m, axis)
    broken = counts > n
    original = groups.blocks
    groups.blocks = lambda shape, axis, m: original(shape, axis, m, most)  # type: ignore[assignment]
    try:
        found = count_groups(array, n, m, axis)
    finally:
        groups.blocks = original
    assert (found.broken, found.total) == (broken.sum(), broken.size)
    if broken.any():
        place = np.unravel_index(np.argmax(broken), broken.shape)
        assert found.worst == counts[place]
        assert found.first == tuple(int(i) * (m if a == axis else 1) for a, i in enumerate(place))
    else:
        assert found.first is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 200))
def test_blocks_cut_without_gaps(shape: list[int], axis: int, most: int) -> None:
    axis %= len(shape)
    shape[axis] *= 4
    seen = np.zeros(shape, int)
    for where in blocks(tuple(shape), axis, 4, most):
        seen[where] += 1
        part = seen[where]
        assert part.shape[axis] % 4 == 0
        assert part.size <= max(most, 4)
    assert (seen == 1).all()


@pytest.mark.parametrize("shape", [(4, 2**22), (2**22, 4), (1, 2**24), (2**10, 2**8, 4, 4), (2**20, 16, 1, 1)])
def test_memory_does_not_grow_with_the_tensor(shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.int8)
    axis = 1 if len(shape) == 4 or shape[0] > 4 or shape[0] == 1 else 0
    tracemalloc.start()
    try:
        assert count_groups(array, 2, 4, axis).broken == math.prod(shape) // 4
        assert tracemalloc.get_traced_memory()[1] < 12 * BLOCK
    finally:
        tracemalloc.stop()


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole groups of 4"):
        count_groups(np.ones((2, 6)), 2, 4, 1)
    with pytest.raises(ValueError, match="no whole groups of 0"):
        count_groups(np.ones((2, 6)), 2, 0, 1)
