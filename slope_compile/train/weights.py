"""Initial weights: from a local file (.safetensors, .pt, .pth, .bin), or from a library's own pretrained model.

Only the head may differ from the model's, where it was made for another number of classes: it is drawn anew.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from slope_compile.errors import ModelError, SlopeCompileError

SHOWN = 6  # names listed in an error
MAX_BYTES = 32 * 2**30  # of a weights file, unpacked
WRAPPINGS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts keep the state dict
PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile
PER_CLASS = (1, 4)  # rows of a head's tensor for each class: a logit, the sides of a box


def load_local(model: nn.Module, path: Path, head: int) -> list[str]:
    """Load a state dict, key by key what the model has; shapes are compared before anything is copied.

    Args:
        model: Whose tensors are filled.
        path: A safetensors file, or one that `torch.save` wrote; a state dict, or a dict that holds one.
        head: Classes of the model's head.

    Returns:
        Names of the head's tensors that are not in the file, because its head has another number of classes.

    Raises:
        ModelError: If the file is missing, too large or no state dict, or keys or shapes beside the head's differ.
    """
    if not path.is_file():
        raise ModelError(f"model.weights: there is no file {path}.", "Check the path.")
    _refuse_size(path, path.stat().st_size)
    found = _unprefixed(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path))
    ours = model.state_dict()
    shapes = {name: tuple(t.shape) for name, t in ours.items()}, {name: tuple(t.shape) for name, t in found.items()}
    drawn = _other_head(*shapes, head)
    if differences := _differences(*({k: s for k, s in side.items() if k not in drawn} for side in shapes)):
        raise ModelError(
            f"model.weights: {path} does not fit the model: {'; '.join(differences)}.",
            "The weights must be of this very model, stem included; only the head's number of classes may differ.",
        )
    with torch.no_grad():
        for name in ours.keys() - set(drawn):
            ours[name].copy_(found[name])
    return drawn


def _other_head(ours: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], head: int) -> list[str]:
    """Return the tensors that differ as those of a head with another number of classes do, all in one proportion."""
    unlike = [name for name in sorted(ours.keys() & found.keys()) if ours[name] != found[name]]
    pairs = [(ours[name], found[name]) for name in unlike]
    heads = all(a and b and a[1:] == b[1:] and b[0] and a[0] in [head * k for k in PER_CLASS] for a, b in pairs)
    return unlike if heads and len({Fraction(a[0], b[0]) for a, b in pairs}) == 1 else []


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, "a safetensors file", error) from None
    return tensors


def _read_torch(path: Path) -> dict[str, Tensor]:
    """Read what `torch.save` wrote, by torch's unpickler that makes tensors and plain containers only."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            _refuse_size(path, sum(entry.file_size for entry in archive.infolist()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old files are read through deprecated classes
            raw: Any = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - see above
    except Exception as error:  # an unpickler fed with arbitrary bytes raises whatever it likes
        raise _unreadable(path, "a PyTorch file of tensors alone", error) from None
    for _ in WRAPPINGS:
        inner = [raw[key] for key in WRAPPINGS if key in raw] if isinstance(raw, Mapping) else []
        raw = inner[0] if inner and isinstance(inner[0], Mapping) else raw
    strangers = [str(name) for name, value in raw.items() if not _is_plain(value)] if isinstance(raw, Mapping) else []
    if not isinstance(raw, Mapping) or not raw or strangers:
        what = f"{_some(strangers)} in it" if strangers else f"it holds {type(raw).__name__}"
        raise _unreadable(path, "a state dict", ValueError(f"{what} is no tensor"))
    return {str(name): tensor for name, tensor in raw.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized


def _unprefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _refuse_size(path: Path, size: int) -> None:
    if size > MAX_BYTES:
        raise ModelError(
            f"model.weights: {path} holds {size} bytes, more than {MAX_BYTES}.", "Save the weights alone, unpacked."
        )


def _unreadable(path: Path, what: str, error: Exception) -> ModelError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"model.weights: {path} is not {what} that can be read: {lines[0].rstrip('.')}.",
        "Save it with `torch.save(model.state_dict(), …)` or safetensors' `save_file`.",
    )


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
        ModelError, ArtifactError: `error_type`, if the file does not parse, or its keys, shapes or types differ.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            found = {key.removeprefix(prefix): tuple(file.get_slice(key).get_shape()) for key in keys}
            if differences := _differences({name: tuple(t.shape) for name, t in state.items()}, found):
                raise error_type(f"{path} does not fit the model: {'; '.join(differences)}.", remedy)
            with torch.no_grad():
                for name, tensor in state.items():
                    kept = file.get_tensor(prefix + name)
                    if kept.dtype != tensor.dtype:  # copying would round it, or widen what was rounded
                        raise error_type(f"{path}: {name} is {kept.dtype}, the model's is {tensor.dtype}.", remedy)
                    tensor.copy_(kept)
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
