"""One seed: FP32 once, then every arm from those same weights over the same images in the same order."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from benchmarks.ablation.arms import Arm, compress, compressed, penalty, tighten
from benchmarks.ablation.glyphs import CLASSES, alphabet, draw
from benchmarks.ablation.network import network
from slope_compile.compression.api import layer_statistics
from slope_compile.recipe import TrainSection
from slope_compile.train.optimizer import make_optimizer

VALIDATION_SEED = 10**6
FP32_LR, LR, WARMUP = 0.1, 0.01, 50
EMA_DECAY = 0.98
RE_ESTIMATION = 100  # batches
DISTILLED_AT = 2.0  # temperature


@dataclass(frozen=True)
class Scale:
    """How much is trained; `batch` images a step."""

    fp32_steps: int
    steps: int
    batch: int = 64
    validation: int = 10_000


SCALES = {
    "small": Scale(2000, 600),
    "long": Scale(2000, 2400),
    "full": Scale(20_000, 6000),
    "smoke": Scale(20, 10, 16, 200),
}


def run_seed(seed: int, arms: Sequence[Arm], scale: Scale) -> list[dict[str, Any]]:
    """Return one row an arm."""
    torch.set_num_threads(1)  # the same sums whatever the machine, and no quarrel between jobs
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawings = alphabet()
    held_out = [part.to(device) for part in draw(drawings, scale.validation, VALIDATION_SEED)]
    images, labels = draw(drawings, (scale.fp32_steps + scale.steps) * scale.batch, seed)
    images, labels = images.to(device), labels.to(device)
    cut = scale.fp32_steps * scale.batch
    torch.manual_seed(seed)
    fp32 = network(CLASSES).to(device)
    _fit(fp32, Arm("fp32", None), images[:cut], labels[:cut], scale.batch, FP32_LR, None)
    first = _accuracy(fp32, held_out)
    rows = []
    for arm in arms:
        start = time.perf_counter()
        model = copy.deepcopy(fp32)
        compress(model, arm)
        average = _fit(model, arm, images[cut:], labels[cut:], scale.batch, LR, fp32)
        row = {"seed": seed, "arm": arm.name, "fp32": first, "accuracy": _accuracy(model, held_out)}
        row |= _alignment(model)
        row["accuracy_ema"] = _accuracy(average, held_out)
        _re_estimate(model, images[-RE_ESTIMATION * scale.batch :], scale.batch)
        row["accuracy_re_estimated"] = _accuracy(model, held_out)
        row["seconds"] = round(time.perf_counter() - start, 1)
        rows.append(row)
        print(
            f"seed {seed}  {arm.name:32} {row['accuracy']:.4f}  cosine {row['cosine']}  {row['seconds']} s", flush=True
        )
    return rows


def _fit(
    model: nn.Module, arm: Arm, images: Tensor, labels: Tensor, batch: int, lr: float, teacher: nn.Module | None
) -> nn.Module:
    """Train a model in place with SGD, a short warm-up and a cosine; return the moving average of its weights."""
    optimizer = make_optimizer(model, TrainSection(lr=lr))
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(EMA_DECAY), use_buffers=True)
    steps = len(images) // batch
    model.train()
    for step in range(steps):
        x, y = images[step * batch : (step + 1) * batch], labels[step * batch : (step + 1) * batch]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        if arm.gradual:
            tighten(model, arm, step / steps)
        optimizer.zero_grad()
        with parametrize.cached():
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            if arm.distillation and teacher is not None:
                loss = (1 - arm.distillation) * loss + arm.distillation * _distance(logits, teacher, x)
            (loss + penalty(model, arm, step / steps)).backward()
        optimizer.step()
        average.update_parameters(model)
    return average


def _distance(logits: Tensor, teacher: nn.Module, x: Tensor) -> Tensor:
    """Return Hinton's T² KL(teacher || student)."""
    teacher.eval()
    with torch.no_grad():
        target = F.log_softmax(teacher(x) / DISTILLED_AT, dim=1)
    student = F.log_softmax(logits / DISTILLED_AT, dim=1)
    return DISTILLED_AT**2 * F.kl_div(student, target, log_target=True, reduction="batchmean")


def _accuracy(model: nn.Module, held_out: Sequence[Tensor]) -> float:
    images, labels = held_out
    model.eval()
    with torch.inference_mode(), parametrize.cached():
        pairs = zip(images.split(1000), labels.split(1000), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pairs)
    return right / len(labels)


def _re_estimate(model: nn.Module, images: Tensor, batch: int) -> None:
    """Measure the batch norms' statistics anew under the final weights, a plain mean over the batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad(), parametrize.cached():
        for x in images.split(batch):
            model(x)


def _alignment(model: nn.Module) -> dict[str, float | None]:
    """Return cosine and density, means over the layers with a pattern, and the SQNR of their weights together, dB."""
    chosen = {name for name, _, slope in compressed(model) if slope.pattern is not None}
    layers = [row for name, row in layer_statistics(model).items() if name in chosen]
    if not layers:
        return {"cosine": None, "sqnr_db": None, "density": None}
    mean = {key: sum(row[key] for row in layers) / len(layers) for key in ("cosine", "sqnr_db", "density")}
    return {key: round(value, 5) for key, value in mean.items()}
