"""Reads and writes whole models for the passes: bad files refused, tensors beside the file where protobuf would end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from slope_compile.errors import ArtifactError
from slope_compile.qdq.tensors import REMEDY, load_model

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 2**30  # a bigger model keeps its tensors in a file beside it: protobuf ends at 2 GiB


def load_graph(path: Path) -> ir.Model:
    """Return a model with all its tensors in memory, and those of Constant nodes as initializers.

    Raises:
        ArtifactError: If it is no ONNX model, or external data is missing, cut off or outside the model's folder.
    """
    import onnx_ir as ir  # a second, and no device needs it
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    load_model(path)
    try:
        model = ir.load(path)
        ir.external_data.load_to_model(model)
        # Files of other tools may hold codes and scales in Constant nodes.
        LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0)(model)
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}.", REMEDY) from None
    return model


def save_graph(model: ir.Model, path: Path) -> Path:
    """Write a model, tensors of over 1 GiB in all into PATH with the suffix `.data`; return the path.

    Raises:
        OSError: If the disk is full or read-only.
    """
    import onnx_ir as ir

    constants = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in constants if tensor is not None)
    ir.save(model, path, external_data=path.with_suffix(".data").name if size > INLINE_BYTES else None)
    return path
