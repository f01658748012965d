"""Which layers could use sparse kernels and which do: as the log says, as the kernels are called, as we count.

Three things that are easily taken for one another, and are kept apart here:

* fits 2:4: our own count of the stored codes. It says nothing about a kernel.
* eligible: TensorRT found 2:4 weights in a layer for which it has sparse kernels: a `(Sparsity)` line of the build log,
  else `HasSparseWeights` of the engine inspector.
* chosen: the kernel in the engine is a sparse one: by its name, or by a `(Sparsity)` line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slope_compile.build.holding import Held
from slope_compile.build.layers import EngineLayer, Sparsity, split_name
from slope_compile.targets.backends import Backend

NO_LINES = "the build log has no (Sparsity) lines"
NO_NAMES = "the build log counts layers and does not name them"
NO_LAYER = "the engine's layer list does not name the layer"
OWN_COUNT = "own count: 2:4, multiplied as INT8 or held as FP16"


def at_run_time(backend: Backend) -> str:
    """Return why a backend that builds ahead of time cannot say what it chose."""
    return f"{backend.title} chooses kernels at run time"


def sparse_row(held: Held, sparsity: Sparsity, backend: Backend, operator: tuple[str, ...]) -> dict[str, Any]:
    """Return `sparse_eligible` and `sparse_chosen` of one weight, None where unknown, and `sparse_note`, why.

    Args:
        held: Where the weight is and what computes its operator.
        sparsity: What the log says.
        backend: Who built.
        operator: The operator's ONNX name, if it has one.
    """
    eligible, no_eligible = _eligible(held, sparsity, operator)
    chosen, no_chosen = _chosen(held, sparsity, backend, operator)
    if backend.rtx:
        no_eligible = no_eligible and at_run_time(backend)
    notes = {"eligible": no_eligible, "chosen": no_chosen}
    unknown = "; ".join(f"{what} not checked: {why}" for what, why in notes.items() if why)
    return {"sparse_eligible": eligible, "sparse_chosen": chosen, "sparse_note": unknown or None}


def _eligible(held: Held, sparsity: Sparsity, operator: tuple[str, ...]) -> tuple[bool | None, str | None]:
    if held.compute is None:
        return None, NO_LAYER
    if sparsity.eligible is None:
        return held.compute.sparse_weights, None if held.compute.sparse_weights is not None else NO_LINES
    return _listed(held.compute, operator, sparsity.eligible, sparsity.eligible_names)


def _chosen(
    held: Held, sparsity: Sparsity, backend: Backend, operator: tuple[str, ...]
) -> tuple[bool | None, str | None]:
    if held.compute is None:
        return None, NO_LAYER
    if backend.rtx:
        return None, at_run_time(backend)
    if is_sparse_kernel(held.compute):
        return True, None
    if sparsity.chosen is None:
        return (None, NO_LINES) if held.compute.tactic is None else (False, None)
    listed, why = _listed(held.compute, operator, sparsity.chosen, sparsity.chosen_names)
    return (False, None) if listed is None and held.compute.tactic is not None else (listed, why)


def _listed(
    layer: EngineLayer, operator: tuple[str, ...], count: int, names: frozenset[str]
) -> tuple[bool | None, str | None]:
    """Return whether a layer is in a list of the log's, which may be a bare count."""
    if count and not names:
        return None, NO_NAMES
    return layer.name in names or any(not set(operator).isdisjoint(split_name(name)) for name in names), None


def is_sparse_kernel(layer: EngineLayer) -> bool:
    """Return whether the kernel is one for sparse weights, such as `sm80_xmma_fprop_sparse_conv_interleaved_…`."""
    return "spars" in (layer.tactic or "").lower()


def sparse_counts(
    rows: Sequence[Mapping[str, Any]], layers: Sequence[EngineLayer], sparsity: Sparsity, backend: Backend
) -> dict[str, Any]:
    """Return the counts over a whole engine, None where unknown, with who says so or why nobody does.

    Args:
        rows: As `engine_rows` returned them.
        layers: The engine's layers.
        sparsity: What the log says.
        backend: Who built.
    """
    fits = [row for row in rows if row.get("fits_2_4")]
    eligible, eligible_by = sparsity.eligible, "log line"
    if eligible is None:
        flags = [layer.sparse_weights for layer in layers if layer.sparse_weights is not None]
        eligible, eligible_by = (sum(flags), "HasSparseWeights") if flags else (None, _not_checked(NO_LINES))
    chosen, chosen_by = sparsity.chosen, "log line"
    if backend.rtx:
        chosen, chosen_by = None, _not_checked(at_run_time(backend))
    elif chosen is None:
        kernels = [layer for layer in layers if layer.tactic is not None]
        chosen = sum(is_sparse_kernel(layer) for layer in kernels) if kernels else None
        chosen_by = "kernel names" if kernels else _not_checked(NO_LINES)
    return {
        "eligible": eligible,
        "eligible_by": eligible_by,
        "chosen": chosen,
        "chosen_by": chosen_by,
        "fits_2_4": len(fits),
        "possible": sum(_is_possible(row["engine"]) for row in fits),
    }


def _is_possible(engine: Mapping[str, Any]) -> bool:
    """Return whether sparse kernels of a type exist for a layer: INT8 products and FP16 weights (TensorRT's guide)."""
    return bool(engine["int8_product"]) or engine["dtype"] == "Half"


def _not_checked(reason: str) -> str:
    return f"not checked: {reason}"
