"""`sc.pack` and `sc.load`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slope_compile.pack.read import Packed, open_packed
from slope_compile.pack.write import pack_model, pack_onnx

if TYPE_CHECKING:
    from torch import nn


def pack(source: nn.Module | str | Path, path: str | Path) -> Packed:
    """Pack a compressed torch model, or an ONNX file with its external data, and prove the written bytes.

    Args:
        source: A model that `slope_compile.compress` compressed, or the path of an ONNX file of whatever origin.
        path: The file to write.

    Returns:
        The packed file, open: see `load`.

    Raises:
        ModelError: If the model is not compressed.
        ArtifactError: If the ONNX file is missing, cut off or malformed.
        CheckFailedError: If the written bytes do not hold what was packed.
        StorageError: If the file system refuses; what was there stays.
    """
    if isinstance(source, str | Path):
        return pack_onnx(Path(source), Path(path))
    return pack_model(source, Path(path))


def load(path: str | Path, model: nn.Module | None = None) -> Packed:
    """Open a packed file; nothing of a tensor is read before it is asked for.

    Args:
        path: A file that `pack` wrote.
        model: A plain torch model of the same architecture, in place given the compressed weights, bit for bit, and
            everything else of the state dict.

    Returns:
        The file: `.kind`, `.codes`, `.tensors`, `.sizes`, `.restore(folder)`.

    Raises:
        ArtifactError: If the file is missing, damaged or of a later format, or a coded tensor breaks a law.
        ModelError: If the model has other names, shapes or types; it is left as it was.
    """
    packed = open_packed(Path(path))
    if model is not None:
        from slope_compile.pack.torch_model import load_into

        load_into(packed, model)
    return packed
