"""Writes the model that a backend gets: the exported one with every weight where it was placed, and proves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from slope_compile.errors import BackendError
from slope_compile.placement.choose import Place
from slope_compile.placement.rounding import exact_values, rounded
from slope_compile.placement.save import load_graph, save_graph
from slope_compile.placement.scales import blocked_scale, row_scale
from slope_compile.placement.situation import Situation
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.versions import parse_version

if TYPE_CHECKING:
    import onnx_ir as ir

    from slope_compile.placement.passes.blocks import Scales

NAME = "placed.onnx"
CONSTANTS = ("float", "sparse-fp16")
_REMEDY = "Export the model with slope-compile, or leave that layer out of build.placement."


def placed_model(
    onnx: Path, weights: Sequence[CodedWeight], places: Sequence[Place], situation: Situation, folder: Path
) -> Path:
    """Write FOLDER/placed.onnx, from which the engine is built, and prove that it holds the same weights.

    Tensors of over 1 GiB in all go into FOLDER/placed.data.

    Args:
        onnx: The exported model, or one of another tool.
        weights: Its weights.
        places: What becomes of each of them, in the same order (`choose_places`).
        situation: Who takes it, and the type of activations that are not quantized.
        folder: Where the file goes.

    Returns:
        The file.

    Raises:
        ArtifactError: If the model cannot be read.
        BackendError: If a weight cannot be placed, or is another one in the file that was written.
    """
    import onnx_ir as ir  # a second, and no device needs it

    model = load_graph(onnx)
    try:
        _rewrite(model, weights, places, situation)
    except ir.passes.InvariantError as error:
        raise BackendError(f"{onnx}: {situation.backend.title} needs other weights, and {error}.", _REMEDY) from None
    path = save_graph(model, folder / NAME)
    prove(path, weights, places)
    return path


def _rewrite(model: ir.Model, weights: Sequence[CodedWeight], places: Sequence[Place], situation: Situation) -> None:
    """Run the passes in order: scales, containers, constants, operators, then the activations' type."""
    from slope_compile.placement.passes.blocks import SetScales
    from slope_compile.placement.passes.containers import SetContainers
    from slope_compile.placement.passes.fold import FoldWeights
    from slope_compile.placement.passes.gemm import MatMulToGemm, wanted_form

    pairs = list(zip(weights, places, strict=True))
    coded = [(weight, place) for weight, place in pairs if weight.codes is not None]
    kept = [(weight, place) for weight, place in coded if place.placement not in CONSTANTS]
    SetScales({w.name: s for w, p in kept if (s := _scales(w, p)) is not None})(model)
    SetContainers({w.name: p.container for w, p in kept if p.container != w.dtype})(model)
    FoldWeights({w.name: constants(w, p) for w, p in coded if p.placement in CONSTANTS})(model)
    version = parse_version(situation.version)
    forms = {w.name: wanted_form(situation.backend.name, version, p.placement) for w, p in pairs}
    MatMulToGemm([name for name, form in forms.items() if form == "Gemm"])(model)
    if situation.precision != "fp32":
        from slope_compile.placement.passes.precision import SetPrecision

        SetPrecision(situation.precision)(model)


def constants(weight: CodedWeight, place: Place) -> npt.NDArray[np.float32]:
    """Return the float32 values that a weight becomes as a constant: exact, or for `sparse-fp16` rounded once."""
    values = exact_values(weight)
    return rounded(values, place.container) if place.placement == "sparse-fp16" else values


def _scales(weight: CodedWeight, place: Place) -> Scales | None:
    """Return the scales that a weight needs in its place; None where it has them."""
    from slope_compile.placement.passes.blocks import Scales

    axis = weight.reduction_axis
    tail = axis is not None and place.block_size and weight.stored.shape[axis] % place.block_size
    if place.block_size == weight.block_size and not tail:
        return None
    scale = blocked_scale(weight, place.block_size) if place.block_size else row_scale(weight)
    if axis is None or scale is None:
        raise BackendError(
            f"The scales of '{weight.name}' do not fit blocks of {place.block_size or weight.block_size}.", _REMEDY
        )
    return Scales(scale, axis if place.block_size else 1 - axis, place.block_size)


def prove(path: Path, weights: Sequence[CodedWeight], places: Sequence[Place]) -> None:
    """Prove on the bytes written that every weight is where it was placed, its values bit for bit.

    What is compared is codes times scale in float32, before a cast to the activations' type. A constant that is stored
    in 16 bits must be those values rounded once.

    Raises:
        BackendError: Naming the first weight that differs.
    """
    wanted: dict[str, list[tuple[CodedWeight, Place]]] = {}
    for weight, place in zip(weights, places, strict=True):
        wanted.setdefault(weight.name, []).append((weight, place))
    written = coded_weights(path)
    if different := sorted(set(wanted) ^ {weight.name for weight in written}):
        raise BackendError(f"{path.name} holds other weights than the model: {', '.join(different[:5])}.", _REMEDY)
    for new in written:
        # A tensor that is used in several ways is there several times, and each use must find its own again.
        problems = [_difference(old, new, place) for old, place in wanted[new.name]]
        if all(problems):
            raise BackendError(
                f"The weight '{new.name}' could not be placed as {wanted[new.name][0][1].placement} unchanged: "
                f"{problems[0]}.",
                _REMEDY,
            )


def _difference(old: CodedWeight, new: CodedWeight, place: Place) -> str | None:
    """Say how a written weight differs from what was asked for, None if it does not."""
    if place.placement in CONSTANTS:
        if new.codes is not None or (place.placement == "sparse-fp16" and new.dtype != place.container):
            return f"the file holds {new.dtype}"
        expected, found = constants(old, place), exact_values(new)
        if new.dtype in ("FLOAT16", "BFLOAT16"):
            expected = rounded(expected, new.dtype)
        return None if _same(expected, found) else "values differ"
    if new.dtype != place.container or new.block_size != place.block_size:
        return f"the file holds {new.dtype} in blocks of {new.block_size}"
    found, codes = exact_values(new), new.stored
    if codes.ndim != old.stored.ndim:
        return f"the file holds {codes.ndim} axes"
    if codes.shape != old.stored.shape:
        inside = tuple(slice(size) for size in old.stored.shape)
        if np.count_nonzero(codes) != np.count_nonzero(codes[inside]):
            return "what it was padded with is not zero"
        found, codes = found[inside], codes[inside]
    if not np.array_equal(codes, old.stored):
        return "codes differ"
    return None if _same(exact_values(old), found) else "values differ"


def _same(expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> bool:
    """Return whether two arrays are the same bits."""
    return expected.shape == found.shape and bool(np.array_equal(expected.view(np.uint32), found.view(np.uint32)))
