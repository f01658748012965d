"""Batches: a deterministic order, the ranks' shares, workers whose errors arrive as ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from slope_compile.errors import DataError
from slope_compile.train.data import mix
from slope_compile.train.tasks import Classification

Collate = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker: exceptions with two arguments do not survive the DataLoader's transport."""

    problem: str
    remedy: str


@dataclass(frozen=True)
class _Told:
    """A batch, and what was wrong with the images that others stand for in it."""

    batch: Any
    replaced: list[str]

    def pin_memory(self) -> _Told:
        return _Told(self.batch.pin_memory(), self.replaced)


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            item = self._dataset[index]
            return item, getattr(self._dataset, "take_replaced", list)()
        except DataError as error:
            return _Failure(error.problem, error.remedy)


def _collate(collate: Collate, items: list[Any]) -> Any:
    for item in items:
        if isinstance(item, _Failure):
            return item
    return _Told(collate([item for item, _ in items]), [text for _, replaced in items for text in replaced])


def batch_count(items: int, batch: int) -> int:
    """Return how many batches an epoch has."""
    return math.ceil(items / batch)


def epoch_order(items: int, batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Return an epoch's batches in random order: every item once, sizes that differ by one at most.

    Spreading the remainder keeps the last batch from being tiny: a batch of one breaks batch norm.
    """
    order = torch.randperm(items, generator=torch.Generator().manual_seed(mix(seed, epoch)))
    return [part.tolist() for part in torch.tensor_split(order, batch_count(items, batch))]


def in_order(items: int, batch: int, rank: int = 0, world: int = 1) -> list[list[int]]:
    """Return one rank's share of all items, in order, in batches of `batch` at most."""
    mine = list(range(items))[rank::world]
    return [mine[start : start + batch] for start in range(0, len(mine), batch)]


def batches(
    dataset: Dataset[Any],
    order: Sequence[list[int]],
    workers: int,
    pin: bool,
    collate: Collate | None = None,
    told: Callable[[str], object] | None = None,
) -> Iterator[Any]:
    """Yield the batches of `order`.

    Args:
        dataset: The items.
        order: The indices of each batch.
        workers: Processes that read items; 0 reads them here.
        pin: Whether batches go to page-locked memory.
        collate: A task's; classification's if not given.
        told: Called with what was wrong with each image that another stands for.

    Raises:
        DataError: If an item cannot be read, or a worker process dies.
    """
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=partial(_collate, collate or Classification().collate),
        pin_memory=pin,
        generator=torch.Generator(),  # its own: the loader would draw a number from the model's otherwise
    )
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise DataError(
                f"A data worker died: {str(error).splitlines()[0]}.",
                "It may have run out of memory: lower data.workers or data.batch, or give /dev/shm more room.",
            ) from error
        if isinstance(batch, _Failure):
            raise DataError(batch.problem, batch.remedy)
        if told is not None:
            for text in batch.replaced:
                told(text)
        yield batch.batch
