"""The machine under the loop: accelerate's Accelerator, precision, determinism."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import set_seed
from torch import nn

from slope_compile.errors import TrainingError
from slope_compile.train.data import mix

Precision = Literal["auto", "fp32", "bf16", "fp16"]


def make_accelerator(precision: Precision) -> Accelerator:
    """Return the Accelerator of this process (one of several under torchrun or `accelerate launch`).

    Raises:
        TrainingError: If fp16 is asked for without a GPU.
    """
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise TrainingError("train.precision is fp16, and there is no GPU here.", "Set train.precision: auto.")
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    # The state is a singleton that refuses another precision than the process's first training had.
    AcceleratorState._reset_state()
    # Without cpu=True, ranks on a machine with no GPU would each train alone.
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not gpu)


def wait_for_all() -> None:
    """Wait until every process of a torchrun or `accelerate launch` is here; alone, go on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


@contextmanager
def deterministic() -> Iterator[None]:
    """Ask torch for deterministic algorithms; an operator that has none runs as it is."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    benchmark, fill = torch.backends.cudnn.benchmark, settings.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        # Filling every fresh tensor guards against reads of uninitialized memory, at the price of writing it twice.
        settings.fill_uninitialized_memory = False
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        settings.fill_uninitialized_memory = fill


def seed_epoch(seed: int, epoch: int, alike: bool = False) -> None:
    """Seed every generator for one epoch (dropout, stochastic depth), each rank differently unless `alike`.

    A resumed run thus draws what an uninterrupted one would have drawn.
    """
    set_seed(mix(seed, epoch), device_specific=not alike)


def over_ranks(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return each value summed over all ranks."""
    if accelerator.num_processes == 1:
        return values
    summed: torch.Tensor = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device))
    return summed.tolist()


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers: each has its own running statistics after its last batch."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
