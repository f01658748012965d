"""Parity: the trained model, ONNX Runtime and the engine give the same outputs, as far as their arithmetic allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

from slope_compile.errors import ArtifactError
from slope_compile.qdq.tensors import load_model
from slope_compile.verify.detections import Detections, are_detections, match
from slope_compile.verify.golden import Golden
from slope_compile.verify.runners import (
    Array,
    Arrays,
    TorchRunner,
    infer,
    infer_onnx,
    interface,
    quiet,
)
from slope_compile.verify.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, reason, significant

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn


@dataclass(frozen=True)
class Pair:
    """Golden inputs and outputs under the names that the ONNX model gives them."""

    inputs: Arrays
    outputs: Arrays


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

    def figures(self) -> dict[str, Any]:
        """Return the measured numbers, rounded."""
        return {
            "max_abs": significant(self.max_abs),
            "relative": significant(self.relative),
            "cosine": significant(self.cosine, 6),
            "top1_agreement": None if self.top1 is None else round(self.top1, 6),
            **({} if self.detections is None else self.detections.figures()),
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


def check_onnx(
    session: Once[ort.InferenceSession],
    tolerance: Once[Tolerance],
    model: Once[nn.Module] | None,
    golden: Once[Pair] | None,
    samples: Callable[[], Sequence[Arrays]],
    steps: Callable[[nn.Module, Sequence[Arrays], dict[str, Any]], list[str] | None] | None = None,
) -> Check:
    """`parity.onnx`: the trained torch model, its golden outputs and ONNX Runtime without optimizations agree.

    Where the model cannot be had, the golden outputs are the reference; where it can, they must also be its own.

    Args:
        session: The ONNX file in ONNX Runtime, optimizations disabled.
        tolerance: What float32 allows.
        model: The trained model.
        golden: Inputs and the outputs which the trained model had for them at export.
        samples: Gives further inputs, one mapping a feed.
        steps: Compares a file with quantized activations segment by segment; returns what is wrong and adds to the
            figures, or None where nothing is quantized. What it finds counts, and the outputs are then told only.
    """
    if model is None and golden is None:
        raise NotCheckedError("neither the trained model nor golden outputs were given")
    problems: list[str] = []
    known = _load(golden, problems)
    torch_model, why_not = _load_model(model, problems)
    feeds = [*([known.inputs] if known else []), *(samples() if torch_model is not None else [])]
    if not feeds:
        if problems:
            return Check("parity.onnx", "fail", listed(problems))
        raise NotCheckedError(why_not or "no inputs were given")
    run, allowed = session(), tolerance()
    if torch_model is None and not problems:
        require_telling(allowed)
    count = sum(_batch(feed) for feed in feeds)
    figures = {"samples": count, "tolerance": significant(allowed.relative), "derivation": allowed.derivation}
    reference, whose, note = [known.outputs] if known else [], "the golden outputs", f"; torch was not run: {why_not}"
    if torch_model is not None:
        reference, whose, note = infer(TorchRunner(torch_model, run), feeds), "the trained model", ""
        if known is not None:
            what = "the golden outputs are not the trained model's"
            problems += _differences([known.outputs], reference[:1], allowed, what, figures, "golden_")
    tested = infer_onnx(run, feeds, "onnxruntime")
    segments = steps(torch_model, feeds, figures) if torch_model is not None and steps is not None else None
    judged = allowed if segments is None else None
    problems += _differences(reference, tested, judged, f"ONNX Runtime against {whose}", figures)
    problems += segments or []
    within = f"{count} samples within {figures.get('relative')} of {whose}, allowed {figures['tolerance']}"
    if segments is not None:
        within = (
            f"{figures['quantizers']} quantizers and the outputs are the trained ones segment by segment, within "
            f"{figures['segment_relative']} of an allowed {figures['segment_tolerance']}; from end to end {count} "
            f"samples are within {figures.get('relative')} (told, not judged)"
        )
    elif "detections" in figures:
        within += f"; {figures['off']} of {figures['detections']} detections apart, allowed {figures['off_allowed']}"
        if not figures["detections"] and not problems:
            raise NotCheckedError(f"nothing is detected in {count} samples: there is nothing to compare")
    return Check("parity.onnx", "fail" if problems else "pass", listed(problems) or within + note, figures)


def require_telling(allowed: Tolerance) -> None:
    """Raise where any outputs would do.

    Raises:
        NotCheckedError: If the tolerance reaches the largest output.
    """
    if not allowed.relative < 1:  # nor from NaN
        raise NotCheckedError(
            f"rounding alone moves outputs by {allowed.relative:.2g} of the largest: nothing can be told from them"
        )


def check_default(
    reference: Once[ort.InferenceSession], default: Callable[[], ort.InferenceSession], feeds: Sequence[Arrays]
) -> Check:
    """`parity.onnx-default`: what ONNX Runtime's default optimizations change, against the run without them.

    They may replace INT4 products by 8-bit arithmetic, so how far they move the outputs is reported, not judged; only
    an output that is NaN, infinite or of another shape fails.
    """
    if not feeds:
        raise NotCheckedError("no inputs were given")
    expected = infer_onnx(reference(), feeds, "optimizations off")
    found = compare(expected, infer_onnx(default(), feeds, "default optimizations"), Tolerance(0.0, "reported only"))
    moved = f"default optimizations move outputs by {found.relative:.1e} of the largest (reported, not judged)"
    return Check("parity.onnx-default", "pass", moved, found.figures())


def named(golden: Golden, onnx: Path) -> Pair:
    """Give golden arrays the names of the ONNX model's one input and its outputs, in the model's order.

    Raises:
        ArtifactError: If the model cannot be read, has several inputs, or other outputs.
    """
    inputs, outputs = interface(load_model(onnx).graph)
    kept = dict(golden.outputs)
    if list(kept) == [""] and len(outputs) == 1:
        kept = {outputs[0]: kept[""]}
    if len(inputs) != 1 or set(outputs) != set(kept):
        many = f"{len(inputs)} inputs and the outputs {', '.join(outputs)}"
        theirs = ", ".join(kept) if list(kept) != [""] else "one output"
        raise ArtifactError(
            f"The ONNX model has {many}; golden samples are of one input and {theirs}.", "Export it again."
        )
    return Pair({inputs[0]: golden.inputs}, {name: kept[name] for name in outputs})


def _load(golden: Once[Pair] | None, problems: list[str]) -> Pair | None:
    """Return the golden inputs and outputs; a damaged file is a problem, and the rest is still compared."""
    try:
        return None if golden is None else golden()
    except Exception as error:
        problems.append(reason(error))
        return None


def _load_model(model: Once[nn.Module] | None, problems: list[str]) -> tuple[nn.Module | None, str]:
    """Return the model, or None and why; a model that cannot be had here is a reason, a damaged one a problem."""
    if model is None:
        return None, "it was not given"
    try:
        return model(), ""
    except NotCheckedError as error:
        return None, str(error)
    except Exception as error:
        problems.append(reason(error))
        return None, reason(error)


def _differences(
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
        found = compare(reference, tested, allowed or Tolerance(0.0, "told only"))
    except ValueError as error:
        return [f"{what}: {error}"]
    figures |= {f"{prefix}{name}": value for name, value in found.figures().items()}
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


def _batch(feed: Mapping[str, Array]) -> int:
    return int(next(iter(feed.values())).shape[0])


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
