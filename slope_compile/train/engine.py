"""The machine under the loop: accelerate's Accelerator, precision, the compiler, determinism, the ranks' agreement."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin, set_seed
from torch import Tensor, nn

from slope_compile.errors import TrainingError
from slope_compile.train.data import mix

Precision = Literal["auto", "fp32", "bf16", "fp16"]
T = TypeVar("T")


def make_accelerator(precision: Precision) -> Accelerator:
    """Return the Accelerator of this process (one of several under torchrun or `accelerate launch`).

    What `accelerate launch` was told about precision, accumulation and compilation does not count: the recipe does.

    Raises:
        TrainingError: If fp16 is asked for without a GPU, or the launcher for anything but DDP.
    """
    gpu = torch.cuda.is_available()
    if precision == "fp16" and not gpu:
        raise TrainingError("train.precision is fp16, and there is no GPU here.", "Set train.precision: auto.")
    if precision == "auto":
        precision = "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"
    # The state is a singleton that refuses another precision than the process's first training had.
    AcceleratorState._reset_state()
    # Without cpu=True, ranks on a machine with no GPU would each train alone.
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=not gpu,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_backend="no",
    )
    plain = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in plain:
        raise TrainingError(
            f"The launcher set up {accelerator.distributed_type.value}; training runs alone or under DDP.",
            "Use torchrun, or `accelerate launch --multi_gpu` without FSDP or DeepSpeed.",
        )
    return accelerator


def process_count() -> int:
    """Return how many processes train together, as torchrun or `accelerate launch` has set it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Wait until every process of a torchrun or `accelerate launch` is here; alone, go on."""
    if process_count() > 1:
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
            # The compiler looks at its inputs; compressed weights are no leaves.
            warnings.filterwarnings("ignore", message=".*grad attribute of a Tensor that is not a leaf.*")
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


def require_compiler(device: torch.device) -> None:
    """Compile and run a function of one line.

    Raises:
        TrainingError: If torch.compile does not work here.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(4, device=device))
    except Exception as error:  # no compiler, no Triton, an unsupported Python: each has an exception of its own
        raise compile_error(error) from error


def compile_error(error: Exception) -> TrainingError:
    """Return the error for a model, or a machine, that torch.compile cannot work with."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TrainingError(
        f"train.compile: torch.compile does not work here: {type(error).__name__}: {lines[0].rstrip('.')}.",
        "Install a C++ compiler (CPU) or Triton (GPU), or set train.compile: false.",
    )


def over_ranks(accelerator: Accelerator, values: list[float]) -> list[float]:
    """Return each value summed over all ranks."""
    if accelerator.num_processes == 1:
        return values
    summed: torch.Tensor = accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=accelerator.device))
    return summed.tolist()


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return every rank's value, on every rank."""
    values: list[Any] = [value] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def every_rank(value: T) -> list[T]:
    """Return every rank's value, on every rank, also where no Accelerator is at hand; alone, just this one's."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers: a model may hold some that its own share of the data changes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def refuse_drift(accelerator: Accelerator, model: nn.Module) -> None:
    """Compare the ranks' state dicts byte for byte: masks and codes are functions of them.

    Raises:
        TrainingError: If they differ.
    """
    digests = gathered(accelerator, state_digest(model)) if accelerator.num_processes > 1 else [""]
    unlike = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if unlike:
        raise TrainingError(
            f"The weights of process {unlike[0]} differ from those of process 0 after the same steps.",
            "Use the same software and kind of GPU for every process; the state before this epoch is kept.",
        )


def state_digest(model: nn.Module) -> str:
    """Return the sha256 over names and bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat: Tensor = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode() + b"\0" + flat.numpy().tobytes())
    return digest.hexdigest()
