"""Batches: a deterministic order, the ranks' shares, workers whose errors arrive as ours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from slope_compile.errors import DataError
from slope_compile.train.data import mix

Batch = tuple[Tensor, Tensor]  # float32 [n, 3, size, size], int64 [n]


@dataclass(frozen=True)
class _Failure:
    """A DataError on its way from a worker: exceptions with two arguments do not survive the DataLoader's transport."""

    problem: str
    remedy: str


class _Guarded(Dataset["tuple[Tensor, int] | _Failure"]):
    def __init__(self, dataset: Dataset[tuple[Tensor, int]]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> tuple[Tensor, int] | _Failure:
        try:
            return self._dataset[index]
        except DataError as error:
            return _Failure(error.problem, error.remedy)


def _collate(items: list[tuple[Tensor, int] | _Failure]) -> Batch | _Failure:
    for item in items:
        if isinstance(item, _Failure):
            return item
    images, labels = default_collate(items)
    return images, labels


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
    dataset: Dataset[tuple[Tensor, int]], order: Sequence[list[int]], workers: int, pin: bool
) -> Iterator[Batch]:
    """Yield the batches of `order`.

    Raises:
        DataError: If an item cannot be read, or a worker process dies.
    """
    loader = DataLoader(
        _Guarded(dataset),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
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
        yield batch
