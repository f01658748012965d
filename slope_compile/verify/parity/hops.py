"""The hops from the trained model into ONNX Runtime: `parity.folded`, `parity.onnx`, `parity.onnx-default`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_compile.errors import ArtifactError
from slope_compile.qdq.activations import stored_quantizers
from slope_compile.qdq.sites import site_problems
from slope_compile.verify.chain.places import DEFAULT, FOLDED, ONNX, TRAINED, WORDS, Chain
from slope_compile.verify.chain.runners import Arrays, samples_of
from slope_compile.verify.laws.constants import constant_problems, noted
from slope_compile.verify.parity.outputs import NOTHING_DETECTED, Pair, differences, require_telling
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, reason, significant

NOT_NAMED = "the golden samples name no quantizers of activations: whether their model had these is not told"

if TYPE_CHECKING:
    from torch import nn

    Steps = Callable[[nn.Module, Sequence[Arrays], dict[str, Any]], list[str] | None]


def check_folded(chain: Chain, tolerance: Once[Tolerance]) -> Check:
    """`parity.folded`: the codes times the scales answer what the weights of the training answer.

    Both run in torch with the same values, so on one machine the same bits are expected; what is judged is the
    tolerance, which another device or another order of the sums needs.

    Args:
        chain: The places.
        tolerance: What float32 allows.
    """
    name = "parity.folded"
    folded = chain.folded_model()  # first, because without parametrized weights there is nothing to compare
    reference, tested = chain.run(TRAINED), chain.run(FOLDED)
    same = _same_bits(reference, tested)
    figures: dict[str, Any] = {"samples": sum(samples_of(feed) for feed in chain.feeds()), "bit_equal": same}
    if same:
        allowed = Tolerance(0.0, "the same bits")
    else:
        allowed = tolerance()
        require_telling(allowed)
    figures |= {"tolerance": significant(allowed.relative), "derivation": allowed.derivation}
    what = f"{type(folded).__name__} with its weights folded to codes x scales, against {WORDS[TRAINED]}"
    problems = differences(reference, tested, allowed, what, figures)
    if problems:
        return Check(name, "fail", listed(problems), figures)
    count = figures["samples"]
    if same:
        return Check(name, "pass", f"{count} samples have the same bits with the weights folded", figures)
    within = f"{count} samples within {figures['relative']} with the weights folded, allowed {figures['tolerance']}"
    return Check(name, "pass", within, figures)


def check_onnx(chain: Chain, tolerance: Once[Tolerance], steps: Steps | None = None) -> Check:
    """`parity.onnx`: the folded torch model, the golden outputs and ONNX Runtime without optimizations agree.

    Where folding is impossible the trained model is the reference, and where no model can be had the golden outputs;
    where it can, they must also be its own.

    Args:
        chain: The places.
        tolerance: What float32 allows.
        steps: Compares a file with quantized activations segment by segment; returns what is wrong and adds to the
            figures, or None where nothing is quantized. What it finds counts, and the outputs are then told only.
    """
    name = "parity.onnx"
    if chain.model is None and chain.golden is None:
        raise NotCheckedError("neither the trained model nor golden outputs were given")
    problems: list[str] = []
    known = _load(chain.golden, problems)
    place, model, why_not = _load_model(chain, problems)
    figures: dict[str, Any] = {}
    others = [] if known is None else _sited(known, chain.onnx, figures)
    problems += others
    if (problems and (known is None or (others and model is None))) or not chain.feeds():
        if problems:  # of samples of another model nothing else is told by comparing
            return Check(name, "fail", listed(problems), figures)
        raise NotCheckedError(why_not or "no inputs were given")
    allowed = tolerance()
    if model is None and not problems:
        require_telling(allowed)
    figures |= {"tolerance": significant(allowed.relative), "derivation": allowed.derivation}
    tested = chain.run(ONNX)
    if model is not None:
        reference, whose, note = chain.run(place), WORDS[place], ""
        if known is not None:
            what = "the golden outputs are not the trained model's"
            problems += differences([known.outputs], chain.run(TRAINED)[:1], allowed, what, figures, "golden_")
        if place == FOLDED:  # a file with other weights than a model of ours may keep its constants as it likes
            problems += noted(constant_problems(chain.onnx, model), figures)
    elif known is not None:
        tested = tested[:1]
        reference, whose, note = [known.outputs], "the golden outputs", f"; torch was not run: {why_not}"
    else:
        raise NotCheckedError(why_not)
    feeds = chain.feeds()[: len(tested)]
    figures["samples"] = count = sum(samples_of(feed) for feed in feeds)
    segments = steps(model, feeds, figures) if model is not None and steps is not None else None
    judged = allowed if segments is None else None
    problems += differences(reference, tested, judged, f"ONNX Runtime against {whose}", figures)
    problems += segments or []
    within = f"{count} samples within {figures.get('relative')} of {whose}, allowed {figures['tolerance']}"
    if segments is not None:
        within = (
            f"{figures.get('quantizers', 0)} quantizers and the outputs are the trained ones segment by segment, "
            f"within {figures['segment_relative']} of an allowed {figures['segment_tolerance']}; from end to end "
            f"{count} samples are within {figures.get('relative')} (told, not judged)"
        )
    elif "detections" in figures:
        within += f"; {figures['off']} of {figures['detections']} detections apart, allowed {figures['off_allowed']}"
        if not figures["detections"] and not problems:
            raise NotCheckedError(NOTHING_DETECTED)
    note += f"; {NOT_NAMED}" if figures.get("golden_not_told") else ""
    return Check(name, "fail" if problems else "pass", listed(problems) or within + note, figures)


def check_default(chain: Chain, tolerance: Once[Tolerance]) -> Check:
    """`parity.onnx-default`: ONNX Runtime's default optimizations leave the outputs where they are without them.

    Args:
        chain: The places.
        tolerance: What float32 allows, and 8 bits where ONNX Runtime may replace products by such.
    """
    name = "parity.onnx-default"
    if not chain.feeds():
        raise NotCheckedError("no inputs were given")
    expected, allowed = chain.run(ONNX), tolerance()
    tested = chain.run(DEFAULT)
    judged = allowed if allowed.relative < 1 else None
    figures: dict[str, Any] = {"tolerance": significant(allowed.relative), "derivation": allowed.derivation}
    problems = differences(expected, tested, judged, "ONNX Runtime's default optimizations", figures)
    if problems:
        return Check(name, "fail", listed(problems), figures)
    if figures.get("detections") == 0:
        raise NotCheckedError(NOTHING_DETECTED)
    moved = f"default optimizations move outputs by {figures['relative']}"
    if judged is None:
        return Check(name, "not checked", f"{moved} (told, not judged: {allowed.derivation})", figures)
    return Check(name, "pass", f"{moved}, allowed {figures['tolerance']}", figures)


def _same_bits(reference: Sequence[Arrays], tested: Sequence[Arrays]) -> bool:
    """Return whether all outputs are equal; NaN equals nothing."""
    return all(
        list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(reference, tested, strict=True)
    )


def _load(golden: Once[Pair] | None, problems: list[str]) -> Pair | None:
    """Return the golden inputs and outputs; a damaged file is a problem."""
    try:
        return None if golden is None else golden()
    except Exception as error:
        problems.append(reason(error))
        return None


def _sited(known: Pair, onnx: Path, figures: dict[str, Any]) -> list[str]:
    """Return how a file's quantizers of activations are not those of the golden samples' model, each named.

    What samples of an older export do not tell is noted in the figures.
    """
    try:
        if known.sites is not None:
            found = listed(site_problems(known.sites, onnx))
            return [f"{onnx.name} quantizes otherwise than the model of {known.name}: {found}"] if found else []
        if stored_quantizers(onnx):
            figures["golden_not_told"] = ["quantizers"]
    except ArtifactError as error:
        return [error.problem]
    return []


def _load_model(chain: Chain, problems: list[str]) -> tuple[str, nn.Module | None, str]:
    """Return the last torch model before the file and its place; or None and why.

    A model that cannot be had here is a reason, a damaged one a problem.
    """
    if chain.model is None:
        return TRAINED, None, "it was not given"
    try:
        return *chain.reference(), ""
    except NotCheckedError as error:
        return TRAINED, None, str(error)
    except Exception as error:
        problems.append(reason(error))
        return TRAINED, None, reason(error)
