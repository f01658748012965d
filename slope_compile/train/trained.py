"""A trained model again: load it from the run folder, measure it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from slope_compile.artifacts import read_json
from slope_compile.compression.api import Report, compress
from slope_compile.errors import ArtifactError
from slope_compile.recipe import CompressionSection, Recipe
from slope_compile.train.data import ImageDataset
from slope_compile.train.loader import batches, in_order
from slope_compile.train.models import build_model
from slope_compile.train.tasks import Classification
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
    compress_by(recipe.compression, model)
    read_into(model.state_dict(), folder / CHECKPOINT, ArtifactError, TRAIN_AGAIN)
    return model.eval()


def compress_by(section: CompressionSection, model: nn.Module) -> Report:
    """Compress a model in place, as the recipe says."""
    return compress(
        model,
        bits=section.bits,
        pattern=section.pattern,
        method=section.method,
        regularizer=section.regularizer,
        strength=section.strength,
        granularity=section.granularity,
        first_last_bits=section.first_last_bits,
        overrides=section.overrides,
    )


def evaluate(
    model: nn.Module,
    dataset: ImageDataset,
    batch: int,
    *,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
) -> dict[str, float]:
    """Measure a model in eval mode and float32 on the device that it is on.

    Args:
        model: Images [n, 3, size, size] -> logits [n, classes].
        dataset: The items.
        batch: Images at a time.
        workers: Processes that read images.
        share: (rank, ranks): this process measures every ranks-th item; the result is over all of them.

    Returns:
        `accuracy` (share of 1), `loss` (mean cross entropy), `items`.

    Raises:
        DataError: If an item cannot be read.
    """
    device = next(model.parameters()).device
    order = in_order(len(dataset), batch, *share)
    training, meter = model.training, None
    model.eval()
    # Within cached() each compressed weight is computed once, not once per batch; nothing changes it in here.
    with parametrize.cached(), torch.inference_mode():
        for images, labels in batches(dataset, order, workers, pin=device.type == "cuda"):
            logits, labels = model(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
            meter = meter or Classification(logits.shape[1]).meter(device)
            meter.update(logits, labels)
    model.train(training)
    if meter is None:
        raise ValueError(f"rank {share[0]} of {share[1]} has no item to measure")
    return meter.compute()


def _class_names(path: Path) -> list[str]:
    try:
        return list(read_json(path)["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not name the classes: {error}.", TRAIN_AGAIN) from None
