"""Outputs compared with outputs, through Polygraphy's Comparator: how far apart, and whether that is allowed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto
from onnx.helper import np_dtype_to_tensor_dtype
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

from slope_compile.errors import ArtifactError
from slope_compile.qdq.sites import Sites
from slope_compile.qdq.tensors import load_graph
from slope_compile.verify.chain.golden import Golden, require_own, require_shapes
from slope_compile.verify.chain.runners import Array, Arrays, interface, quiet
from slope_compile.verify.parity.detections import Detections, are_detections, match
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import NotCheckedError, significant

NOTHING_DETECTED = "nothing is detected in any sample: there is nothing to compare"


@dataclass(frozen=True)
class Pair:
    """Golden inputs and outputs under the names that the ONNX model gives them, and what else their file says."""

    inputs: Arrays
    outputs: Arrays
    sites: Sites | None = None
    name: str = "golden.safetensors"


@dataclass(frozen=True)
class Difference:
    """How far tested outputs are from reference outputs, over all outputs of all feeds.

    Args:
        within: Whether Polygraphy's Comparator found every element within the tolerance.
        max_abs: The largest |difference|.
        relative: The same, relative to the largest |reference| of that output.
        cosine: Cosine similarity of all tested with all reference values.
        top1: Share of samples whose largest output is at the same place; None where outputs are no scores (n, classes).
        detections: Of a detector, what was paired; the other figures are then over pairs.
    """

    within: bool
    max_abs: float
    relative: float
    cosine: float
    top1: float | None
    detections: Detections | None = None

    def figures(self, judged: bool = True) -> dict[str, Any]:
        """Return the measured numbers, rounded; what would be allowed, only where it is judged."""
        counts = {} if self.detections is None else self.detections.figures()
        if not judged:
            counts.pop("off_allowed", None)
        return {
            "max_abs": significant(self.max_abs),
            "relative": significant(self.relative),
            "cosine": significant(self.cosine, 6),
            "top1_agreement": None if self.top1 is None else round(self.top1, 6),
            **counts,
        }

    def told(self, allowed: Tolerance) -> str:
        """Return how far the outputs are apart, in words."""
        far = f"differs by {self.relative:.2e} of the largest output, allowed {allowed.relative:.2e}"
        return far if self.detections is None else f"{far}; {self.detections}"


def compare(reference: Sequence[Arrays], tested: Sequence[Arrays], tolerance: Tolerance) -> Difference:
    """Compare outputs feed by feed through Polygraphy's Comparator, each element within `tolerance`.

    Raises:
        ValueError: If names or shapes differ, or a value is NaN or infinite.
    """
    for expected, found in zip(reference, tested, strict=True):
        _require_comparable(expected, found)
    scale = {name: max(_largest(feed[name]) for feed in reference) for name in reference[0]}
    if are_detections(list(reference[0])):
        return _of_detections(match(reference, tested, tolerance), scale)
    results = RunResults()
    for name, iterations in (("tested", tested), ("reference", reference)):
        results.append((name, [IterationResult(_doubles(feed), runtime=0.0, runner_name=name) for feed in iterations]))
    allowed = {name: tolerance.relative * largest for name, largest in scale.items()}
    function = SimpleCompareFunc(atol=allowed, rtol=0.0, check_error_stat="elemwise")
    with quiet(), np.errstate(all="ignore"):
        accuracy = Comparator.compare_accuracy(results, compare_func=[function])[0]
    rows = [(name, row) for feed in accuracy["tested", "reference"] for name, row in feed.items()]
    worst = max(row.max_absdiff for _, row in rows)
    relative = max(row.max_absdiff / scale[name] if scale[name] else row.max_absdiff for name, row in rows)
    within = all(bool(row) for _, row in rows)
    return Difference(within, worst, relative, _cosine(reference, tested), _top1(reference, tested))


def _of_detections(found: Detections, scale: Mapping[str, float]) -> Difference:
    """Return the difference of paired detections; `scale` is the largest reference value of each output."""
    apart = {name: _largest(a - b) for name, (a, b) in found.pairs.items()}
    relative = max(far / scale[name] if scale[name] else far for name, far in apart.items())
    expected, tested = ({name: pair[side] for name, pair in found.pairs.items()} for side in (0, 1))
    return Difference(found.within, max(apart.values()), relative, _cosine([expected], [tested]), None, found)


def told_only(reference: Sequence[Arrays]) -> Tolerance:
    """Return the tolerance with which a difference is measured and not judged.

    Of detections those are then off that have no partner, however far apart the others are.
    """
    return Tolerance(math.inf if are_detections(list(reference[0])) else 0.0, "told only")


def require_telling(allowed: Tolerance) -> None:
    """Raise where any outputs would do.

    Raises:
        NotCheckedError: If the tolerance reaches the largest output.
    """
    if not allowed.relative < 1:  # nor from NaN
        raise NotCheckedError(
            f"rounding alone moves outputs by {allowed.relative:.2g} of the largest: nothing can be told from them"
        )


def require_found(found: Difference) -> None:
    """Raise where a detector found nothing, so that there was nothing to compare.

    Raises:
        NotCheckedError: If so.
    """
    if found.within and found.detections is not None and not found.detections.count:
        raise NotCheckedError(NOTHING_DETECTED)


def named(golden: Golden, onnx: Path) -> Pair:
    """Give golden arrays the names of the ONNX model's one input and its outputs, in the model's order.

    Raises:
        ArtifactError: If the model cannot be read, has several inputs, other outputs, or other axes or
            type of its input.
    """
    require_own(golden, onnx)
    graph = load_graph(onnx).graph
    inputs, outputs = interface(graph)
    kept = dict(golden.outputs)
    if list(kept) == [""] and len(outputs) == 1:
        kept = {outputs[0]: kept[""]}
    if len(inputs) != 1 or set(outputs) != set(kept):
        many = f"{len(inputs)} inputs and the outputs {', '.join(outputs)}"
        theirs = ", ".join(kept) if list(kept) != [""] else "one output"
        raise ArtifactError(
            f"The ONNX model has {many}; golden samples are of one input and {theirs}.", "Export it again."
        )
    _require_fitting(golden.inputs, next(value for value in graph.input if value.name == inputs[0]))
    require_shapes(graph, kept)
    ordered = {name: kept[name] for name in outputs}
    return Pair({inputs[0]: golden.inputs}, ordered, golden.sites, golden.name)


def _require_fitting(inputs: Array, declared: ValueInfoProto) -> None:
    """Raise unless the model takes such inputs: Polygraphy would turn and cast them until it does."""
    kind = declared.type.tensor_type
    wanted = [axis.dim_value if axis.HasField("dim_value") else None for axis in kind.shape.dim]
    fits = len(wanted) == inputs.ndim and all(b in (None, a) for a, b in zip(inputs.shape[1:], wanted[1:], strict=True))
    if (kind.HasField("shape") and not fits) or np_dtype_to_tensor_dtype(inputs.dtype) != kind.elem_type:
        axes = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
        raise ArtifactError(
            f"Golden inputs are {inputs.dtype} {list(inputs.shape)}; the model's '{declared.name}' is "
            f"{TensorProto.DataType.Name(kind.elem_type)} {axes}.",
            "Export it again.",
        )


def differences(
    reference: Sequence[Arrays],
    tested: Sequence[Arrays],
    allowed: Tolerance | None,
    what: str,
    figures: dict[str, Any],
    prefix: str = "",
) -> list[str]:
    """Compare, note the figures under `prefix`, and return what is wrong, so that later findings count too.

    Without `allowed` any finite outputs of the same shapes do.
    """
    try:
        found = compare(reference, tested, allowed or told_only(reference))
    except ValueError as error:
        return [f"{what}: {error}"]
    measured = found.figures(judged=allowed is not None)
    figures |= {f"{prefix}{name}": value for name, value in measured.items()}
    if allowed is None or found.within:
        return []
    return [f"{what}: {found.told(allowed)}"]


def _require_comparable(expected: Arrays, found: Arrays) -> None:
    if list(expected) != list(found):
        raise ValueError(f"outputs are named {', '.join(found)}, not {', '.join(expected)}")
    for name, array in found.items():
        if array.shape != expected[name].shape:
            raise ValueError(f"output '{name}' has shape {array.shape}, not {expected[name].shape}")
        for whose, values in (("", array), (" of the reference", expected[name])):
            bad = int(np.count_nonzero(~np.isfinite(values)))
            if bad:
                raise ValueError(f"output '{name}'{whose} has {bad} NaN or infinite values of {values.size}")


def _doubles(feed: Arrays) -> OrderedDict[str, Array]:
    return OrderedDict((name, np.asarray(array, dtype=np.float64)) for name, array in feed.items())


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))


def _cosine(reference: Sequence[Arrays], tested: Sequence[Arrays]) -> float:
    a, b = (
        np.concatenate([array.ravel().astype(np.float64) for feed in s for array in feed.values()])
        for s in (reference, tested)
    )
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else float(np.array_equal(a, b))


def _top1(reference: Sequence[Arrays], tested: Sequence[Arrays]) -> float | None:
    scores = [(next(iter(a.values())), next(iter(b.values()))) for a, b in zip(reference, tested, strict=True)]
    if any(a.ndim != 2 or a.shape[1] < 2 for a, _ in scores):
        return None
    same = [np.argmax(a, axis=1) == np.argmax(b, axis=1) for a, b in scores]
    return float(np.mean(np.concatenate(same)))
