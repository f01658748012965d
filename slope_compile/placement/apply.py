"""Writes the model that a backend gets: the exported one, with the codes it cannot take moved to wider types."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slope_compile.errors import BackendError
from slope_compile.placement.choose import Place
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.backends import Backend

INLINE_BYTES = 2**30  # a bigger model keeps its tensors in a file beside it: protobuf ends at 2 GiB


def placed_model(onnx: Path, weights: list[CodedWeight], places: list[Place], backend: Backend, folder: Path) -> Path:
    """Return the ONNX file to build from: the given one where every container suits, else a new one in `folder`.

    Args:
        onnx: The exported model.
        weights: Its weights.
        places: Where each of them goes, in the same order.
        backend: Who takes it.
        folder: Where a new file may be written.

    Raises:
        BackendError: If a weight cannot be moved, or its values would change.
    """
    pairs = zip(weights, places, strict=True)
    moved = {weight.name: place.container for weight, place in pairs if place.container != weight.dtype}
    if not moved:
        return onnx
    import onnx_ir as ir  # seconds, and most builds move nothing

    from slope_compile.placement.passes.containers import WidenCodes

    model = ir.load(onnx)
    ir.external_data.load_to_model(model)
    try:
        WidenCodes(moved)(model)
    except ir.passes.InvariantError as error:
        raise BackendError(
            f"{backend.title} needs other types for some weights, and {error}.", "Export the model with slope-compile."
        ) from None
    path = folder / "placed.onnx"
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data="placed.data" if size > INLINE_BYTES else None)
    _prove(path, weights, places)
    return path


def _prove(path: Path, weights: list[CodedWeight], places: list[Place]) -> None:
    """Raise unless the bytes written hold the same values in the containers chosen."""
    for old, new, place in zip(weights, coded_weights(path), places, strict=True):
        same = np.array_equal(old.stored, new.stored) and np.array_equal(old.values(), new.values())
        if old.name != new.name or new.dtype != place.container or not same:
            raise BackendError(
                f"The weight '{old.name}' could not be moved from {old.dtype} to {place.container} unchanged.",
                "Export the model with slope-compile.",
            )
