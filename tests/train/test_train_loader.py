from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.errors import DataError
from slope_compile.recipe import DataSection
from slope_compile.train.data import load_data
from slope_compile.train.loader import batch_count, batches, epoch_order, in_order


@given(items=st.integers(1, 300), batch=st.integers(1, 64), epoch=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_item_once_in_even_batches(items: int, batch: int, epoch: int) -> None:
    order = epoch_order(items, batch, 5, epoch)
    assert sorted(index for part in order for index in part) == list(range(items))
    assert len(order) == batch_count(items, batch)
    sizes = [len(part) for part in order]
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1  # so a batch of one only where there is one item, or batch is 1
    assert order == epoch_order(items, batch, 5, epoch)


def test_epochs_and_seeds_are_ordered_differently() -> None:
    orders = [epoch_order(100, 100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order[0]) for order in orders}) == 4


@given(items=st.integers(1, 100), batch=st.integers(1, 16), world=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_ranks_share_the_items_without_overlap(items: int, batch: int, world: int) -> None:
    shares = [in_order(items, batch, rank, world) for rank in range(world)]
    assert sorted(i for share in shares for part in share for i in part) == list(range(items))
    assert all(len(part) <= batch for share in shares for part in share)


def test_workers_and_ranks_see_the_same_items() -> None:
    data = load_data(DataSection(source="fake:40", size=8), seed=1).train
    data.set_epoch(3)
    order = epoch_order(len(data), 16, 1, 3)
    alone = list(batches(data, order, workers=0, pin=False))
    helped = list(batches(data, order, workers=2, pin=False))
    halves = [list(batches(data, [part[rank::2] for part in order], workers=0, pin=False)) for rank in (0, 1)]
    for step, (images, labels) in enumerate(alone):
        assert torch.equal(images, helped[step].images)
        assert torch.equal(labels, helped[step].labels)
        for rank in (0, 1):
            assert torch.equal(images[rank::2], halves[rank][step].images)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_during_training_is_a_data_error(image_folder: Path, workers: int) -> None:
    data = load_data(DataSection(source=f"imagefolder:{image_folder}", size=8), seed=0).train
    broken = image_folder / "bee" / "1.png"
    for path in (image_folder / "bee").iterdir():
        path.write_bytes(b"broken meanwhile")
    with pytest.raises(DataError, match=r"bee/\d\.png: not an image"):
        list(batches(data, in_order(len(data), 4), workers, pin=False))
    assert broken.exists()


def test_reading_batches_leaves_the_models_generator_alone() -> None:
    data = load_data(DataSection(source="fake:40", size=8), seed=1).train
    before = torch.random.get_rng_state()
    list(batches(data, in_order(len(data), 16), 0, pin=False))
    assert torch.equal(torch.random.get_rng_state(), before)
