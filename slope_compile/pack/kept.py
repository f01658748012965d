"""What a packed model keeps of a state dict besides its coded tensors: not the latents that those were made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.errors import ArtifactError
from slope_compile.pack.dtypes import MODEL_TYPES
from slope_compile.tensor_file import TensorFile

Array = npt.NDArray[Any]
_LATENT, _STEP = "original", "0.step"  # below LAYER.parametrizations.weight.
_REMEDY = "Take the checkpoint and the codes from one run."


class KeptTensors(Mapping[str, Array]):
    """The tensors of a state dict that are packed beside the coded ones, each read when it is asked for.

    Args:
        dtypes: Name -> safetensors' name of the element type, of all of the state dict.
        read: Returns a tensor.
        coded: Names of the coded tensors.
        where: What to call the state dict in an error.

    Raises:
        ArtifactError: If the state dict has no latents of a coded tensor, latents of another one, or a type that is
            not packed.
    """

    def __init__(
        self, dtypes: Mapping[str, str], read: Callable[[str], Array], coded: Iterable[str], where: str
    ) -> None:
        self._dtypes, self._read = dtypes, read
        if strange := sorted(name for name in dtypes if dtypes[name] not in MODEL_TYPES):
            raise ArtifactError(f"{where}: '{strange[0]}' is of type {dtypes[strange[0]]}, not packed.", _REMEDY)
        made = {name: (_inside(name, _LATENT), _inside(name, _STEP)) for name in coded}
        replaced = {part for parts in made.values() for part in parts}
        if missing := sorted(replaced - dtypes.keys()):
            raise ArtifactError(f"{where} has no '{missing[0]}', of which a coded tensor was made.", _REMEDY)
        for name in [name for name in dtypes if name not in replaced and name.endswith(f".{_LATENT}")]:
            pair = (name, f"{name.removesuffix(_LATENT)}{_STEP}")
            if pair[1] not in dtypes:
                continue  # a parametrization of somebody else's
            # A layer that has two names is coded under one of them.
            if not any(self._equal(pair, parts) for parts in made.values()):
                raise ArtifactError(f"{where} has '{name}', and no coded tensor was made of it.", _REMEDY)
            replaced.update(pair)
        self._names = dict.fromkeys(sorted(dtypes.keys() - replaced))

    def __getitem__(self, name: str) -> Array:
        """Return a tensor, its type as `MODEL_TYPES` shows it."""
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        """Yield the names, ascending."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._names)

    def dtype(self, name: str) -> str:
        """Return safetensors' name of a tensor's element type; nothing else is read."""
        return self._dtypes[name]

    def _equal(self, first: tuple[str, str], second: tuple[str, str]) -> bool:
        return all(
            np.array_equal(self._read(one).reshape(-1).view(np.uint8), self._read(other).reshape(-1).view(np.uint8))
            for one, other in zip(first, second, strict=True)
        )


def kept_of_checkpoint(path: Path, coded: Iterable[str]) -> KeptTensors:
    """Return what is packed of a checkpoint.

    Args:
        path: The safetensors file of a state dict.
        coded: Names of the coded tensors.

    Raises:
        ArtifactError: If it is missing or damaged, or as `KeptTensors`; reading a tensor raises it where it is cut off.
    """
    remedy = "Make it anew with `slope-compile train`."
    try:
        file = TensorFile(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", remedy) from None

    def read(name: str) -> Array:
        entry, kind = file.entries[name], MODEL_TYPES[file.entries[name].dtype]
        try:
            found = np.fromfile(path, np.uint8, entry.elements * kind.itemsize, offset=entry.offset)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}.", remedy) from None
        if found.size != entry.elements * kind.itemsize:
            raise ArtifactError(f"{path}: '{name}' is cut off.", remedy)
        return found.view(kind).reshape(entry.shape)

    return KeptTensors({name: entry.dtype for name, entry in file.entries.items()}, read, coded, str(path))


def _inside(name: str, part: str) -> str:
    layer, dot, tensor = name.rpartition(".")
    return f"{layer}{dot}parametrizations.{tensor}.{part}"
