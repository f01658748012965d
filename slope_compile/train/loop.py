"""The training loop: FP32 first, then compressed fine-tuning, resumable after every epoch.

The result is the model after the last epoch. Choosing the best epoch on the validation split would make the accuracy
measured on that split too good.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _BatchNorm

from slope_compile.artifacts import storage_errors
from slope_compile.codes_file import save_codes
from slope_compile.compression.api import Report, codes, layer_statistics, masks, penalty
from slope_compile.compression.permutation import Permutation
from slope_compile.compression.policy import LayerPlan, plan
from slope_compile.errors import TrainingError
from slope_compile.events import Events
from slope_compile.recipe import Recipe
from slope_compile.train.batchnorm import synchronized
from slope_compile.train.checkpoint import SavedState, find_state, portable, restore, save_state, saved_validation
from slope_compile.train.data import head_classes, load_data
from slope_compile.train.direction import direction_counts, direction_record
from slope_compile.train.engine import (
    compile_error,
    deterministic,
    gathered,
    make_accelerator,
    process_count,
    refuse_drift,
    require_compiler,
    seed_epoch,
    share_buffers,
)
from slope_compile.train.loader import batch_count, batches, epoch_order
from slope_compile.train.models import build_model
from slope_compile.train.optimizer import lr_at, make_optimizer
from slope_compile.train.step import Stepper
from slope_compile.train.tasks import make_task
from slope_compile.train.trained import CHECKPOINT, CODES, METRICS, compress_by, measure
from slope_compile.train.validation import FILE as VALIDATION
from slope_compile.train.validation import Answers, flatten, save_record, unflatten

RECIPE_SECTIONS = ("model", "data", "compression", "train")
VALIDATION_LOSS = "validation_loss"  # in an epoch's record, where "loss" is the training loss
COMPILER = ("torch._dynamo", "torch._inductor")  # where the exceptions of torch.compile come from
MAX_NAMED = 20  # skipped images named one by one


@dataclass(frozen=True)
class Phase:
    """A stretch of epochs with a learning-rate schedule of its own; `first` counts the epochs before it."""

    name: str
    first: int
    epochs: int
    lr: float

    @property
    def end(self) -> int:
        """Epochs behind us when it is over."""
        return self.first + self.epochs


def train(recipe: Recipe, out: Path, state: Path, events: Events) -> None:
    """Train, compress, fine-tune; write the checkpoint, the codes and the metrics.

    Run again with the same recipe and state folder, it goes on after the last finished epoch; on a CPU the result is
    bit for bit that of an uninterrupted run.

    Args:
        recipe: What to train.
        out: An empty folder for checkpoint.safetensors, codes.safetensors, metrics.json.
        state: Where to keep, and look for, the state to resume from.
        events: Told of progress (steps over both phases) and of each epoch's metrics.

    Raises:
        DataError, ModelError, RecipeError: If data, model or compression cannot be had.
        TrainingError: If the loss is not finite, or memory runs out.
        ArtifactError: If the state is damaged or of another recipe.
        StorageError: If the disk refuses; the last committed state stays.
    """
    saved = find_state(state, recipe.digest(*RECIPE_SECTIONS), process_count())
    with deterministic():
        trainer = Trainer(recipe, state, events)
        trainer.refuse_other_folder(saved)
        try:
            trainer.run(saved)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            remedy = "Raise train.accumulate, or lower data.batch and train.lr with it."
            raise TrainingError(f"Out of GPU memory: {reason}.", remedy) from error
        except Exception as error:
            if recipe.train.compile and type(error).__module__.startswith(COMPILER):
                raise compile_error(error) from error
            raise
        trainer.write(out)


class Trainer:
    """One training run.

    Args:
        recipe: What to train.
        state: The folder of the state to resume from.
        events: Who is told; silent on all ranks but the first.
    """

    def __init__(self, recipe: Recipe, state: Path, events: Events) -> None:
        self.recipe, self.state = recipe, state
        self.accelerator = make_accelerator(recipe.train.precision)
        self.events = events if self.accelerator.is_main_process else Events()
        self.data = load_data(recipe.data, recipe.train.seed, recipe.model.classes)
        self.replaced: set[str] = set()  # images found broken while training
        self._tell_skipped()
        classes = head_classes(recipe.model, self.data)
        seed_epoch(recipe.train.seed, 0, alike=True)
        self.model = build_model(
            recipe.model, classes, recipe.data.size, note=lambda text: self.events.note("train", text)
        )
        self.task = make_task(recipe, self.data, self.model)
        plan(self.model, recipe.compression)  # a model or an override that cannot be had fails now, not after FP32
        device = self.accelerator.device
        self.model.to(device)
        if recipe.train.compile:
            require_compiler(device)
        # Tensor cores want channels-last images; on a CPU they cost a quarter more time here. Weights stay as they are.
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        # What the dense model takes as FP32: parameters and running statistics, before any step size is added.
        self.fp32_bytes = sum(4 * t.numel() for t in self.model.state_dict().values() if t.is_floating_point())
        self._refuse_tiny_batches()
        self.steps = batch_count(len(self.data.train), recipe.data.batch)  # per epoch
        self.report: Report | None = None
        # After the last epoch, in the arithmetic of training: figures, and the answers to single items.
        self.measured: tuple[dict[str, float], Answers] | None = None
        self.answers: dict[str, Answers] = {}  # of the models that history has figures of, "fp32" and "compressed"
        self.history: dict[str, Any] = {"fp32": None, "compressed": None, "epochs": []}
        section = recipe.train
        self.fp32 = Phase("fp32", 0, section.pretrain_epochs, section.pretrain_lr or section.lr)
        self.slope = Phase("slope", section.pretrain_epochs, section.epochs, section.lr)

    def refuse_other_folder(self, saved: SavedState | None) -> None:
        """Raise unless every rank has found the same state: nodes must share the run folder."""
        done = gathered(self.accelerator, saved.done if saved else 0)
        if len(set(done)) > 1:
            found = ", ".join(map(str, done))
            raise TrainingError(
                f"The processes find different training states in {self.state}: epochs done are {found}.",
                "Put the run folder on a file system that all nodes share.",
            )

    def run(self, saved: SavedState | None) -> None:
        """Run what is left after `saved`."""
        done = saved.done if saved else 0
        if saved:
            self.history = saved.history
            self.events.note("train", f"resuming after epoch {done} of {self.slope.end}")
            if self.history["fp32"] is not None:
                self.answers["fp32"] = unflatten(saved_validation(saved), "fp32")
        if done < self.fp32.end:
            self.run_phase(self.fp32, done, saved)
            saved, done = None, self.fp32.end
        elif saved and done == self.fp32.end:
            restore(saved, self.model, None)
            saved = None
        if self.history["fp32"] is None:
            self.history["fp32"], self.answers["fp32"] = self._result()
        self.report = compress_by(self.recipe.compression, self.model, permute=saved is None)
        if self.report.permutation is not None:
            self._tell_permuted(self.report.permutation)
        if saved is None:  # no step of the compressed phase is behind us
            self.history["direction"] = direction_counts(self.model)
        self.run_phase(self.slope, done, saved)
        self.history["compressed"], self.answers["compressed"] = self._result()

    def write(self, out: Path) -> None:
        """Write the files of the train stage; equal results give equal bytes."""
        if not self.accelerator.is_main_process or self.report is None:
            return
        last = self.history["epochs"][-1]
        document = {
            "fp32": self.history["fp32"],
            "compressed": self.history["compressed"],
            "epochs": self.history["epochs"],
            "plan": [_plan_row(row) for row in self.report],
            "layers": last["layers"],
            "direction": direction_record(self.history.get("direction"), direction_counts(self.model)),
            "fp32_bytes": self.fp32_bytes,
            "metric": self.task.metric,
            "classes": self.data.classes,
            "data": {"train": len(self.data.train), "validation": len(self.data.validation)},
        }
        if "permutation" in self.history:
            document["permutation"] = self.history["permutation"]
        with storage_errors(out):
            save_file(portable(self.model.state_dict()), out / CHECKPOINT)
            save_codes(out / CODES, codes(self.model))
            save_record(out / VALIDATION, **self.answers)
            (out / METRICS).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def run_phase(self, phase: Phase, done: int, saved: SavedState | None) -> None:
        """Train the epochs of a phase that are not done yet; `saved` is the state to go on from."""
        section = self.recipe.train
        optimizer = make_optimizer(self.model, section)
        model, prepared = self.accelerator.prepare(self.model, optimizer)
        if saved:
            restore(saved, self.model, optimizer)
            if saved.scaler and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(saved.scaler)
        term = penalty if phase is self.slope else None
        stepper = Stepper(
            self.accelerator, self.task, self.model, model, prepared, term, section.accumulate, section.compile
        )
        before = self._masks(phase)
        for epoch in range(done, phase.end):
            with synchronized(self.model):
                record = self._train_epoch(phase, epoch, model, stepper)
            share_buffers(self.model)
            refuse_drift(self.accelerator, self.model)
            self.measured = self._evaluate()
            measured = self.measured[0]
            self._refuse_damage(phase, epoch, record["lr"], measured)
            after = self._masks(phase)
            record |= {VALIDATION_LOSS if name == "loss" else name: value for name, value in measured.items()}
            record["layers"] = self._layer_records(before, after) if phase is self.slope else {}
            before = after
            self.history["epochs"].append(record)
            self.events.metric("train", **record)
            self._save(epoch + 1, optimizer)
        self.model = self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def _train_epoch(self, phase: Phase, epoch: int, model: nn.Module, stepper: Stepper) -> dict[str, Any]:
        section, seed = self.recipe.train, self.recipe.train.seed
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        warmup = min(round(section.warmup_epochs * self.steps), phase.epochs * self.steps)
        seed_epoch(seed, epoch + 1)
        self.data.train.set_epoch(epoch)
        order = epoch_order(len(self.data.train), self.recipe.data.batch, seed, epoch)
        device = self.accelerator.device
        sums, lr = [0.0, 0.0], 0.0
        model.train()
        share = [batch[rank::ranks] for batch in order]
        pin, replaced = device.type == "cuda", set[str]()
        read = batches(self.data.train, share, self.recipe.data.workers, pin, self.task.collate, replaced.add)
        for index, batch in enumerate(read):
            step, items = (epoch - phase.first) * self.steps + index, len(order[index])
            lr = lr_at(step, phase.epochs * self.steps, warmup, phase.lr)
            loss, term = stepper.take(batch.to(device, self.layout), items, lr)
            if not math.isfinite(loss + term):
                raise self._diverged(f"the loss is {loss + term} at step {index + 1} of {self.steps}", phase, epoch, lr)
            sums = [sums[0] + loss * items, sums[1] + term * items]
            text = f"{phase.name} {epoch - phase.first + 1}/{phase.epochs} · loss {loss:.3f}"
            self.events.progress("train", epoch * self.steps + index + 1, self.slope.end * self.steps, text)
        self._tell_replaced(replaced)
        total, penalized = (value / len(self.data.train) for value in sums)
        return {"phase": phase.name, "epoch": epoch - phase.first + 1, "loss": total, "penalty": penalized, "lr": lr}

    def _evaluate(self) -> tuple[dict[str, float], Answers]:
        """Return the task's figures on the validation split, the item count left out, and the answers to its items."""
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        # As many at once as in training: what fits there fits here.
        batch = max(self.recipe.data.batch // (share[1] * self.recipe.train.accumulate), 1)
        workers = self.recipe.data.workers
        data = self.data.validation
        found, answers = measure(self.model, data, batch, task=self.task, workers=workers, share=share)
        return {name: value for name, value in found.items() if name != "items"}, answers

    def _result(self) -> tuple[dict[str, float], Answers]:
        """Return figures and answers of the model as it is, in float32 whatever precision it was trained in."""
        if self.measured is not None and self.accelerator.mixed_precision == "no":
            return self.measured
        return self._evaluate()

    def _masks(self, phase: Phase) -> dict[str, Tensor]:
        return masks(self.model) if phase is self.slope else {}

    def _layer_records(self, before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, dict[str, float | None]]:
        """Return layer -> statistics; flip_rate is the share of weights that changed between kept and pruned."""
        records: dict[str, dict[str, float | None]] = {}
        for name, statistics in layer_statistics(self.model).items():
            flips = (before[name] ^ after[name]).float().mean() if name in after else None
            records[name] = {key: _finite(value) for key, value in statistics.items()}
            records[name]["flip_rate"] = None if flips is None else _finite(flips)
        return records

    def _save(self, done: int, optimizer: optim.Optimizer) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            digest = self.recipe.digest(*RECIPE_SECTIONS)
            ranks = self.accelerator.num_processes
            kept = flatten(self.answers)
            save_state(self.state, digest, done, self.model, optimizer, self.history, scaler, ranks, kept)
        self.accelerator.wait_for_everyone()

    def _tell_permuted(self, permutation: Permutation) -> None:
        """Keep the outcome with the state: whoever resumes later finds the weights permuted."""
        self.history["permutation"] = asdict(permutation)
        self.events.note("train", str(permutation))

    def _tell_skipped(self) -> None:
        skipped = self.data.skipped
        for path, reason in list(skipped.items())[:MAX_NAMED]:
            self.events.warning("train", f"skipped {path}: {reason}")
        if skipped:
            self.events.warning(
                "train", f"{len(skipped)} item(s) of {self.data.source} are not usable and are left out"
            )

    def _tell_replaced(self, replaced: set[str]) -> None:
        """Name the images, met by any rank in this epoch, that did not decode."""
        new = sorted(set().union(*gathered(self.accelerator, replaced)) - self.replaced)
        self.replaced |= set(new)
        for text in new[:MAX_NAMED]:
            self.events.warning("train", f"skipped {text} Its neighbour stands for it.")
        if new:
            self.events.warning("train", f"{len(new)} image(s) met in this epoch do not decode")

    def _refuse_tiny_batches(self) -> None:
        """Raise where a part would hold no image, or a batch norm take statistics over a single one."""
        items, ranks, parts = len(self.data.train), self.accelerator.num_processes, self.recipe.train.accumulate
        least = items // batch_count(items, self.recipe.data.batch) // ranks // parts
        normed = any(isinstance(module, _BatchNorm) for module in self.model.modules())
        if least < 1 or (normed and least * ranks < 2):
            raise TrainingError(
                f"data.batch {self.recipe.data.batch} of {items} images leaves {least} image(s) at a time for each of "
                f"{ranks} process(es) and {parts} part(s){', too few for batch norm' if normed else ''}.",
                "Raise data.batch, lower train.accumulate, or add images.",
            )

    def _refuse_damage(self, phase: Phase, epoch: int, lr: float, measured: dict[str, float]) -> None:
        """Keep weights that are not finite out of the saved state: a finite loss may have led to them."""
        damaged = next((n for n, p in self.model.named_parameters() if not bool(p.isfinite().all())), None)
        if damaged is not None:
            raise self._diverged(f"{damaged} is not finite after the last step", phase, epoch, lr)
        loss = measured.get("loss", 0.0)
        if not math.isfinite(loss):
            raise self._diverged(f"the validation loss is {loss}", phase, epoch, lr)

    def _diverged(self, what: str, phase: Phase, epoch: int, lr: float) -> TrainingError:
        kept = f"The state after epoch {epoch} is kept in {self.state}" if epoch else "No epoch had finished before"
        key = "train.pretrain_lr" if phase is self.fp32 and self.recipe.train.pretrain_lr else "train.lr"
        return TrainingError(
            f"Training diverged: {what} in epoch {epoch + 1} of {self.slope.end} ({phase.name}), "
            f"learning rate {lr:.3g}. {kept}.",
            f"Lower {key} (now {phase.lr:g}) or lengthen train.warmup_epochs, and train again with --force.",
        )


def _plan_row(row: LayerPlan) -> dict[str, Any]:
    return {**asdict(row), "pattern": row.pattern and "{}:{}".format(*row.pattern)}


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None  # JSON has no infinity: the SQNR of an exact layer
