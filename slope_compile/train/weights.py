"""Initial weights: from a local .safetensors file (strict), or from a library's own pretrained model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from slope_compile.errors import ModelError, SlopeCompileError

SHOWN = 6  # names listed in an error


def load_local(model: nn.Module, path: Path) -> None:
    """Load a state dict, key by key what the model has; shapes are compared before anything is read.

    Raises:
        ModelError: If the file is missing, no safetensors file, or its keys or shapes differ from the model's.
    """
    if not path.is_file():
        raise ModelError(f"model.weights: there is no file {path}.", "Check the path.")
    read_into(model.state_dict(), path, ModelError, "The weights must be of this very model, head and stem included.")


def read_into(
    state: Mapping[str, Tensor], path: Path, error_type: type[SlopeCompileError], remedy: str, prefix: str = ""
) -> None:
    """Copy a safetensors file into the tensors of a state dict, in place.

    Args:
        state: Name -> tensor.
        path: The file.
        error_type: What to raise.
        remedy: Of that error.
        prefix: Of the file's keys that are meant; the others are left alone.

    Raises:
        ModelError, ArtifactError: `error_type`, if the file does not parse or its keys or shapes differ.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            found = {key.removeprefix(prefix): tuple(file.get_slice(key).get_shape()) for key in keys}
            if differences := _differences({name: tuple(t.shape) for name, t in state.items()}, found):
                raise error_type(f"{path} does not fit the model: {'; '.join(differences)}.", remedy)
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(file.get_tensor(prefix + name))
    except (SafetensorError, OSError) as error:
        raise error_type(f"{path} is not a safetensors file that can be read: {error}.", remedy) from None


def copy_matching(source: nn.Module, target: nn.Module, categories: int, what: str) -> None:
    """Copy pretrained weights; only the head, whose first axis counts the source's `categories`, may differ.

    Raises:
        ModelError: If anything else differs.
    """
    theirs, ours = source.state_dict(), target.state_dict()
    unlike = {name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape}
    wrong = sorted(n for n in unlike if n not in theirs or theirs[n].ndim == 0 or theirs[n].shape[0] != categories)
    if wrong:
        raise ModelError(
            f"{what} does not fit at {_some(wrong)}.", "Set data.size to the size the weights were trained at."
        )
    with torch.no_grad():
        for name in ours.keys() - unlike:
            ours[name].copy_(theirs[name])


def _differences(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> list[str]:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {found[name]}, the model's is {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    said = [f"missing {_some(missing)}"] if missing else []
    said += [f"unexpected {_some(extra)}"] if extra else []
    return said + ([_some(shapes)] if shapes else [])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
