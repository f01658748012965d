"""A trained model again: load it from the run folder, measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import Dataset

from slope_compile.artifacts import read_json
from slope_compile.compression.api import Report, compress
from slope_compile.errors import ArtifactError
from slope_compile.recipe import CompressionSection, Recipe
from slope_compile.train.loader import batches, in_order
from slope_compile.train.models import build_model
from slope_compile.train.tasks import Classification, Task
from slope_compile.train.validation import Answers
from slope_compile.train.weights import read_into

CHECKPOINT, CODES, METRICS = "checkpoint.safetensors", "codes.safetensors", "metrics.json"
TRAIN_AGAIN = "Make it anew with `slope-compile train … --force`."


def load_trained(recipe: Recipe, folder: Path) -> nn.Module:
    """Return the trained model, compressed (parametrizations attached), in eval mode, on the host.

    Args:
        recipe: The recipe it was trained with.
        folder: The train stage's folder.

    Raises:
        ArtifactError: If the checkpoint is missing, or is not of this model.
        ModelError: If the model cannot be built.
    """
    classes = recipe.model.classes or len(_class_names(folder / METRICS))
    model = build_model(recipe.model, classes, recipe.data.size, load_weights=False)
    compress_by(recipe.compression, model, permute=False)  # the checkpoint's weights are permuted already
    read_into(model.state_dict(), folder / CHECKPOINT, ArtifactError, TRAIN_AGAIN)
    return model.eval()


def compress_by(section: CompressionSection, model: nn.Module, permute: bool = True) -> Report:
    """Compress a model in place, as the recipe says.

    Args:
        section: What to do.
        model: The model.
        permute: Whether to do what `section.permute` asks; not where weights that were permuted follow.
    """
    return compress(
        model,
        bits=section.bits,
        pattern=section.pattern,
        method=section.method,
        regularizer=section.regularizer,
        strength=section.strength,
        granularity=section.granularity,
        first_last_bits=section.first_last_bits,
        activation_bits=section.activation_bits,
        quantize_outputs=section.quantize_outputs,
        permute=section.permute and permute,
        strict=section.strict,
        overrides=section.overrides,
    )


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    batch: int,
    *,
    task: Task | None = None,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Measure a model in eval mode and float32 on the device that it is on.

    Args:
        model: The model.
        dataset: The items; it has a length.
        batch: Items at a time.
        task: Whose meter and collation to use (`make_task`); classification if not given.
        workers: Processes that read items.
        share: (rank, ranks): this process measures every ranks-th item; the result is over all of them.

    Returns:
        The meter's figures; for classification `accuracy` (share of 1), `loss` (mean cross entropy), `items`.

    Raises:
        DataError: If an item cannot be read.
    """
    return measure(model, dataset, batch, task=task, workers=workers, share=share)[0]


def measure(
    model: nn.Module,
    dataset: Dataset[Any],
    batch: int,
    *,
    task: Task | None = None,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> tuple[dict[str, float], Answers]:
    """Measure a model as `evaluate` does; return the figures, and the answers to single items that they come from."""
    chosen: Task = task or Classification()
    device = next(model.parameters()).device
    order = in_order(len(dataset), batch, *share)  # type: ignore[arg-type]
    training, meter = model.training, chosen.meter(device)
    model.eval()
    # Within cached() each compressed weight is computed once, not once per batch; nothing changes it in here.
    with parametrize.cached(), torch.inference_mode():
        for items in batches(dataset, order, workers, pin=device.type == "cuda", collate=chosen.collate):
            items = items.to(device, torch.contiguous_format)
            meter.update(chosen.predict(model, items), items)
    model.train(training)
    return meter.compute(), meter.answers()


def _class_names(path: Path) -> list[str]:
    try:
        return list(read_json(path)["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not name the classes: {error}.", TRAIN_AGAIN) from None
