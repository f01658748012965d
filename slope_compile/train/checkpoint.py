"""The state that training resumes from: one per epoch, safetensors + JSON, never pickle.

    STATE/epoch-000003.safetensors    model.NAME and optimizer.NAME.KEY tensors; validation.NAME, once FP32 was measured
    STATE/state.json                  epochs and processes, metrics so far, recipe digest; the other file's size and
                                      sha256, and one over all of that, so that an edit shows

state.json is the commit: tensors are written first (temporary name, fsync, rename), then state.json in the same way,
then older tensors are removed. A kill at any point leaves a state.json whose tensors are complete, or none at all.

No random-number state is in it: every epoch seeds all generators from (seed, epoch), so the epoch count is that state.
Masks are not either: they are a function of the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn, optim

from slope_compile.artifacts import FileDigest, read_json, storage_errors, sync, write_atomically
from slope_compile.errors import ArtifactError
from slope_compile.train.weights import read_into

FORMAT = 3
START_OVER = "Delete the folder to train from the start."


@dataclass(frozen=True)
class SavedState:
    """What state.json says.

    Args:
        done: Epochs behind us, over both phases.
        history: Metrics so far.
        scaler: State of the loss scaler (fp16 only).
        tensors: The file with the model and the optimizer.
    """

    done: int
    history: dict[str, Any]
    scaler: dict[str, Any] | None
    tensors: Path


def save_state(
    folder: Path,
    recipe: str,
    done: int,
    model: nn.Module,
    optimizer: optim.Optimizer,
    history: Mapping[str, Any],
    scaler: Mapping[str, Any] | None,
    ranks: int = 1,
    validation: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> None:
    """Commit the state after epoch `done`; `recipe` is the digest of what training depends on.

    `ranks` is the number of processes: each drew its own random numbers, so that only as many can go on. `validation`
    holds what models measured so far answered to single items.

    Raises:
        StorageError: If the file system refuses; the state before stays intact.
    """
    path = folder / f"epoch-{done:06d}.safetensors"
    temporary = path.with_suffix(".tmp")
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in optimizer_tensors(model, optimizer).items()}
    tensors |= {f"validation.{name}": torch.from_numpy(array) for name, array in (validation or {}).items()}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(portable(tensors), temporary)
            sync(temporary)
            digest = FileDigest.of(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        document = {
            "format": FORMAT,
            "recipe": recipe,
            "done": done,
            "ranks": ranks,
            "file": path.name,
            **asdict(digest),
            "scaler": None if scaler is None else dict(scaler),
            "history": dict(history),
        }
        write_atomically(folder / "state.json", json.dumps({**document, "seal": _seal(document)}) + "\n")
        for old in folder.glob("epoch-*"):
            if old != path:
                old.unlink()


def find_state(folder: Path, recipe: str, ranks: int = 1) -> SavedState | None:
    """Return the committed state, its bytes proved against the digests; None if there is none.

    Raises:
        ArtifactError: If it is damaged, of another recipe, or of another number of processes than `ranks`.
    """
    document = folder / "state.json"
    if not document.is_file():
        return None
    try:
        raw = read_json(document)
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']!r}, this version reads {FORMAT}")
        if raw.pop("seal") != _seal(raw):
            raise ValueError("it was edited after it was written")
        owner, theirs, tensors = str(raw["recipe"]), int(raw["ranks"]), folder / Path(str(raw["file"])).name
        expected = FileDigest(int(raw["size"]), str(raw["sha256"]))
        saved = SavedState(int(raw["done"]), dict(raw["history"]), raw["scaler"], tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{document} is not a training state of ours: {error}.", START_OVER) from None
    if owner != recipe:
        raise ArtifactError(
            f"{folder} holds the training state of another recipe: the run folder belongs to that one.",
            "Use another --out, or --force to train anew in its place.",
        )
    if theirs != ranks:
        raise ArtifactError(
            f"{folder} holds the training state of {theirs} process(es), and this is a run of {ranks}: "
            "it would not end in the same weights.",
            f"Start {theirs} process(es) to go on, or use --force to train anew with {ranks}.",
        )
    _prove(tensors, expected)
    return saved


def _seal(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _prove(tensors: Path, expected: FileDigest) -> None:
    try:
        found = FileDigest.of(tensors)
    except OSError as error:
        raise ArtifactError(f"{tensors} cannot be read: {error.strerror}.", START_OVER) from None
    if found != expected:
        raise ArtifactError(
            f"{tensors} was truncated or edited: {found.size} bytes with sha256 {found.sha256[:12]}…, "
            f"committed were {expected.size} with {expected.sha256[:12]}….",
            START_OVER,
        )


def restore(saved: SavedState, model: nn.Module, optimizer: optim.Optimizer | None) -> None:
    """Copy a state into the model, and into the optimizer if one is given.

    Raises:
        ArtifactError: If its tensors are not those of this model.
    """
    read_into(model.state_dict(), saved.tensors, ArtifactError, START_OVER, prefix="model.")
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    with safe_open(saved.tensors, framework="pt") as file:
        for key in (key for key in file.keys() if key.startswith("optimizer.")):  # noqa: SIM118
            name, _, slot = key.removeprefix("optimizer.").rpartition(".")
            parameter, stored = parameters[name], file.get_tensor(key)
            # In the parameter's own memory layout, as the optimizer would have made it: fused kernels walk raw memory.
            alike = stored.shape == parameter.shape
            value = torch.empty_like(parameter) if alike else torch.empty_like(stored, device=parameter.device)
            optimizer.state[parameter][slot] = value.detach().copy_(stored)


def saved_validation(saved: SavedState) -> dict[str, np.ndarray[Any, Any]]:
    """Return what `save_state` was given as `validation`."""
    with safe_open(saved.tensors, framework="numpy") as file:
        names = [key for key in file.keys() if key.startswith("validation.")]  # noqa: SIM118
        return {name.removeprefix("validation."): file.get_tensor(name) for name in names}


def optimizer_tensors(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name: NAME.KEY -> tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{names[id(parameter)]}.{key}": value
        for parameter, slots in optimizer.state.items()
        for key, value in slots.items()
        if isinstance(value, Tensor)
    }


def portable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors on the host, none sharing memory, in sorted order: equal contents, equal file bytes."""
    form = torch.contiguous_format
    return {name: tensors[name].detach().to("cpu", memory_format=form, copy=True) for name in sorted(tensors)}
