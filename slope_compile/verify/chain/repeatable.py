"""`repeatable`: the same input gives the same answer, again and in any batch; otherwise nothing can be compared.

Dropout that was left on and batch norms in training mode fail here, by name. A torch model that is given in training
mode is evaluated in evaluation mode, so only what ignores that mode is a fault.

Twice the same batch, and each of its samples alone: two runs of one network on one machine are two implementations of
it at the worst, the lone sample's sums being added in another order, so the tolerance of `tolerance.py` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slope_compile.verify.chain.onnx_causes import onnx_causes
from slope_compile.verify.chain.places import ONNX, TRAINED, WORDS, Chain
from slope_compile.verify.chain.runners import Array, Arrays, TorchRunner, infer, infer_onnx
from slope_compile.verify.laws.digests import external_files
from slope_compile.verify.parity.outputs import Difference, compare
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, reason, significant

if TYPE_CHECKING:
    import onnxruntime as ort

NAME = "repeatable"
NO_CAUSE = "no batch norm in training mode was found: does it mix the samples of a batch?"
RUN_ALONE = 2**28  # bytes of a file that is run on made-up inputs, where no others were given
SAMPLES = 4  # run as a batch twice, and one by one

Run = Callable[[Sequence[Arrays]], list[Arrays]]
Allowed = tuple[Callable[[], Tolerance], Callable[[], Tolerance]]  # without, and with, quantized activations


def check_repeatable(
    chain: Chain,
    tolerance: Once[Tolerance],
    floats: Callable[[], Tolerance],
    unknown: Callable[[], Sequence[str]] = tuple,
) -> Check:
    """Run the trained model and the ONNX file on one batch twice, and on each of its samples alone.

    A node of the file that draws, or takes a batch's own statistics, is a fault whatever the answers show: they may
    show it too little, or not in these samples. What does not answer the same twice is noted in the chain, so that
    nothing is compared with it.

    Args:
        chain: The places.
        tolerance: What float32 allows, with what quantized activations add to it.
        floats: What float32 allows without them.
        unknown: Operators of the file whose rounding has no bound here, in words: where it has any, answers that
            differ are told, not judged.
    """
    causes = onnx_causes(chain.onnx)
    if causes.draws:
        chain.unsteady[ONNX] = f"does not answer the same twice ({listed(causes.draws, 3)})"
    try:
        found = _behaves(chain, tolerance, floats, unknown)
    except NotCheckedError:
        if not causes.faults:
            raise
        found = Check(NAME, "fail", "")
    told = [fault for fault in causes.faults if fault not in found.detail]
    if not told:
        return found
    behaviour = [found.detail] if found.detail and found.status == "fail" else []
    return Check(NAME, "fail", listed([f"ONNX Runtime: {listed(told, 3)}", *behaviour]), found.figures)


def _behaves(
    chain: Chain, tolerance: Once[Tolerance], floats: Callable[[], Tolerance], unknown: Callable[[], Sequence[str]]
) -> Check:
    """Run what can be run here, and judge its answers."""
    if chain.alone and _bytes(chain.onnx) > RUN_ALONE:
        raise NotCheckedError(
            "no node was found that draws random numbers or takes a batch's own statistics; a file as big as this "
            "is not run without samples"
        )
    runs, notes = _sides(chain)
    batch, parts = _inputs(chain)
    figures: dict[str, Any] = {"samples": len(parts) or None}
    problems: list[str] = []
    unjudged = ""
    for place, run in runs.items():
        figures[place], found = _judge(chain, place, run, batch, parts, (floats, tolerance))
        if found and "unexplained" in figures[place] and (operators := listed(unknown(), 3)):
            unjudged = f"{found[0]} (told, not judged: how {operators} sum up and round is not known here)"
        else:
            problems += found
    if problems:
        return Check(NAME, "fail", listed(problems), figures)
    if unjudged:
        return Check(NAME, "not checked", unjudged, figures)
    both = " and ".join(WORDS[place] for place in runs)
    alone = f", and {len(parts)} samples alone as in a batch" if parts else "; the batch is fixed: no sample ran alone"
    told = f"{both} {'answer' if len(runs) > 1 else 'answers'} the same twice{alone}{notes}"
    if chain.alone:
        raise NotCheckedError(f"on made-up inputs {told}; no samples and no model were given to verify the file with")
    return Check(NAME, "pass", told, figures)


def _bytes(onnx: Path) -> int:
    """Return the size of a file and of what lies beside it for its tensors."""
    return sum(
        file.stat().st_size for file in {onnx, *(onnx.parent / name for name in external_files(onnx))} if file.is_file()
    )


def _sides(chain: Chain) -> tuple[dict[str, Run], str]:
    """Return what can be run here by place, and a note on what cannot.

    Raises:
        NotCheckedError: If ONNX Runtime is not installed: it gives torch's tensors their names.
    """
    session = _session(chain)
    runs: dict[str, Run] = {}
    notes = ""
    if chain.model is not None:
        try:
            model = chain.trained_model()
        except NotCheckedError as error:
            notes = f"; torch was not run: {error}"
        else:
            runs[TRAINED] = lambda feeds: infer(TorchRunner(model, session), feeds)
    runs[ONNX] = lambda feeds: infer_onnx(session, feeds, ONNX)
    return runs, notes


def _session(chain: Chain) -> ort.InferenceSession:
    """Return the file in ONNX Runtime, which refuses batch norms in training mode: their names are then the reason."""
    try:
        return chain.session()
    except NotCheckedError:
        raise
    except Exception as error:
        causes = onnx_causes(chain.onnx)
        if not causes.faults:
            raise
        raise ValueError(f"{listed(causes.faults, 3)}; ONNX Runtime does not run it: {reason(error)}") from None


def _inputs(chain: Chain) -> tuple[Arrays, list[Arrays]]:
    """Return a batch, and its samples as feeds of their own; none where the file fixes the length of a batch."""
    feed = chain.given_inputs()[0]
    shapes = {value.name: value.shape for value in chain.session().get_inputs()}
    lengths = {shapes[name][0] for name in feed if shapes.get(name)}
    rows = {array.shape[0] for array in feed.values() if array.ndim}
    if len(lengths) != 1 or isinstance(next(iter(lengths)), int) or len(rows) != 1:
        return feed, []
    batch = {name: array[:SAMPLES] if array.ndim else array for name, array in feed.items()}
    if rows == {1}:  # alone is then no other batch: a second sample is made of the first
        batch = {name: np.concatenate([a, _another(a)]) if a.ndim else a for name, a in batch.items()}
    count = next(array.shape[0] for array in batch.values() if array.ndim)
    return batch, [
        {name: array[row : row + 1] if array.ndim else array for name, array in batch.items()} for row in range(count)
    ]


def _another(array: Array) -> Array:
    """Return a sample unlike the given one that is as good an input: mirrored values, or integers in reverse."""
    return -array if array.dtype.kind == "f" else np.ascontiguousarray(array[..., ::-1])


def _judge(
    chain: Chain, place: str, run: Run, batch: Arrays, parts: Sequence[Arrays], allowed: Allowed
) -> tuple[dict[str, Any], list[str]]:
    """Return the figures of one side and what is wrong with it."""
    whose = WORDS[place]
    first, second = run([batch, batch])
    figures: dict[str, Any] = {"bit_equal": all(_same(first[name], second[name]) for name in first)}
    if not all(np.isfinite(array).all() for array in first.values() if array.dtype.kind == "f"):
        return figures, [_not_finite(chain, whose, first)]
    if not figures["bit_equal"]:
        twice = _apart(first, second, allowed, lambda: _random_causes(chain, place, run, batch))
        figures |= twice.figures("twice")
        if twice.cause is not None:
            cause = twice.cause or "no random operation and no state that it keeps was found"
            chain.unsteady[place] = why = f"does not answer the same twice ({cause})"
            far = twice.difference.told(twice.allowed)
            return figures, [f"{whose} {why}: it {far}"]
    try:
        together = _together(first, run(parts)) if parts else None
    except Exception as error:  # a batch norm in training mode refuses a batch of one
        cause = _batch_causes(chain, place, run, batch) or NO_CAUSE
        return figures, [f"{whose} does not run a sample alone ({cause}): {reason(error)}"]
    if together is None:
        return figures, []
    lone = _apart(first, together, allowed, lambda: _batch_causes(chain, place, run, batch))
    figures |= lone.figures("alone")
    if lone.cause is None:
        return figures, []
    far, mixes = lone.difference.told(lone.allowed), onnx_causes(chain.onnx).mixes if place == ONNX else []
    cause = lone.cause or listed(mixes, 3) or NO_CAUSE
    if place == ONNX and cause == NO_CAUSE:
        figures["unexplained"] = True
    return figures, [f"{whose} answers a sample alone otherwise than in a batch ({cause}): it {far}"]


@dataclass(frozen=True)
class _Apart:
    """How far two answers are apart, within what they may be, and the cause where that is a fault, `""` if unknown."""

    difference: Difference
    allowed: Tolerance
    cause: str | None

    def figures(self, name: str) -> dict[str, Any]:
        return {name: significant(self.difference.relative), "tolerance": significant(self.allowed.relative)}


def _apart(first: Arrays, second: Arrays, allowed: Allowed, causes: Callable[[], str]) -> _Apart:
    """Compare two answers.

    Within what floats allow there is no fault. Beyond, but within what quantized activations make of it, a cause
    decides: rounding sets off rounding in a sound network too.
    """
    floats, widened = allowed
    found = compare([first], [second], floats())
    if found.within:
        return _Apart(found, floats(), None)
    cause = causes()
    if cause:
        return _Apart(found, floats(), cause)
    sound = widened().relative >= 1 or compare([first], [second], widened()).within
    return _Apart(found, widened(), None if sound else "")


def _same(a: Array, b: Array) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _not_finite(chain: Chain, whose: str, outputs: Arrays) -> str:
    name, array = next((n, a) for n, a in outputs.items() if a.dtype.kind == "f" and not np.isfinite(a).all())
    bad = np.count_nonzero(~np.isfinite(array))
    told = f"{whose}: output '{name}' has {bad} NaN or infinite values of {array.size}"
    if chain.alone:  # a logarithm of an input that is never negative, say
        raise NotCheckedError(f"on made-up inputs, of {told}; no samples were given")
    return told


def _together(batch: Arrays, alone: Sequence[Arrays]) -> Arrays | None:
    """Return the answers to the samples as the answer to a batch; None where an output has no row a sample."""
    if not alone or any(array.shape[:1] != (len(alone),) for array in batch.values()):
        return None
    if any(part[name].shape != (1, *array.shape[1:]) for name, array in batch.items() for part in alone):
        return None
    return {name: np.concatenate([part[name] for part in alone]) for name in batch}


def _random_causes(chain: Chain, place: str, run: Run, batch: Arrays) -> str:
    if place == ONNX:
        causes = onnx_causes(chain.onnx).draws
    else:
        from slope_compile.verify.chain.torch_causes import random_causes, state_causes

        causes = random_causes(chain.trained_model(), lambda: run([batch]))
        causes = causes or state_causes(chain.trained_model(), lambda: run([batch]))
    return listed(causes, 3)


def _batch_causes(chain: Chain, place: str, run: Run, batch: Arrays) -> str:
    if place == ONNX:
        causes = onnx_causes(chain.onnx).batch
    else:
        from slope_compile.verify.chain.torch_causes import batch_causes

        causes = batch_causes(chain.trained_model(), lambda: run([batch]))
    return listed(causes, 3)
