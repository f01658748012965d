"""`parity.placed`: the file that the engine was built from is the exported one, in other types.

Weights are compared bit for bit, as codes times scale in float32 before any cast, and the steps of quantizers too. The
outputs are compared in ONNX Runtime, optimizations disabled, within what the types allow (`tolerance.py`). Where
activations are quantized this goes segment by segment, as in `steps.py`: the placed file gets the integers that the
exported one makes, so that no turned integer sets off others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import TensorProto, helper

from slope_compile.placement.rounding import exact_values, rounded
from slope_compile.qdq.activations import StoredQuantizer, stored_quantizers
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.tensors import load_graph, load_model
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.chain.onnx_causes import onnx_causes
from slope_compile.verify.chain.places import ONNX, PLACED, Chain
from slope_compile.verify.chain.runners import (
    Arrays,
    infer_onnx,
    interface,
    load_session,
    output_names,
    reference_session,
)
from slope_compile.verify.laws.constants import Comparison, Unequal, noted, placed_problems
from slope_compile.verify.parity.allowed import half_tensors, of_outputs
from slope_compile.verify.parity.detections import FLOAT_SHARE
from slope_compile.verify.parity.engine import split
from slope_compile.verify.parity.outputs import Difference, compare, require_found, require_telling
from slope_compile.verify.parity.segments import behind_choices, cut_session, made
from slope_compile.verify.parity.steps import CHUNK, Quantized, StepDifference, step_figures
from slope_compile.verify.parity.tolerance import Tolerance, in_half, tolerance_of
from slope_compile.verify.verdict import Check, NotCheckedError, Once, listed, significant

if TYPE_CHECKING:
    import onnxruntime as ort

NAME = "parity.placed"


def check_placed(
    placed: Path | None,
    chain: Chain,
    weights: Once[list[CodedWeight]],
    quantizers: Once[list[StoredQuantizer]],
) -> Check:
    """Compare the placed file with the exported one.

    Args:
        placed: What the engine was built from, if anything was built.
        chain: The places; the exported file is one.
        weights: The exported file's weights.
        quantizers: Its quantizers of activations.
    """
    if placed is None:
        raise NotCheckedError("nothing was built")
    if not placed.is_file():
        return Check(NAME, "fail", f"{placed.name} is missing")
    figures: dict[str, Any] = {"weights": len(weights()), "quantizers": len(quantizers())}
    problems = noted(_weight_problems(weights(), coded_weights(placed)), figures)
    problems += _quantizer_problems(quantizers(), stored_quantizers(placed))
    exported = onnx_causes(chain.onnx).faults
    problems += [f"{placed.name}: {fault}" for fault in onnx_causes(placed).faults if fault not in exported]
    taken = [interface(load_model(path).graph)[0] for path in (chain.onnx, placed)]
    if taken[0] != taken[1]:  # Polygraphy would feed them by their order
        problems.append(f"{placed.name} takes {', '.join(taken[1])}, the exported file {', '.join(taken[0])}")
    if problems:
        return Check(NAME, "fail", listed(problems), figures)
    precision, tensors = half_tensors(placed)
    same = f"{len(weights())} weights of {placed.name} and {len(quantizers())} quantizers are the exported ones"
    changed = noted(placed_problems(chain.onnx, placed), figures)
    inputs = chain.feeds()
    if precision == "bf16" or not inputs:
        if changed:
            return Check(NAME, "fail", listed(changed), figures)
        why = "ONNX Runtime's CPU computes in no BFLOAT16" if inputs else "no inputs were given"
        raise NotCheckedError(f"{same}; its outputs were not compared: {why}")
    allowed = tolerance_of(weights())
    if precision != "fp32":
        allowed = in_half(allowed, tensors, precision)
    figures |= {"precision": precision, "half_tensors": tensors}
    if quantizers() and all(one.zero_point == 0 and one.high <= 127 for one in quantizers()):
        chain.require_steady(ONNX)
        found, problems = _segments(chain.onnx, placed, quantizers(), inputs, allowed, figures)
    else:
        allowed = of_outputs(allowed, chain.onnx, weights(), quantizers(), inputs)
        require_telling(allowed)
        expected = chain.run(ONNX)
        answer = infer_onnx(reference_session(placed), inputs, PLACED)
        chain.keep(PLACED, answer)
        found = compare(expected, answer, allowed)
    figures |= {"tolerance": significant(allowed.relative), "derivation": allowed.derivation, **found.figures()}
    if not found.within:
        problems.append(f"{placed.name} {found.told(allowed)}")
    problems += changed
    if not problems:
        require_found(found)
    detail = f"{same}; outputs in {precision} within {found.relative:.1e}, allowed {allowed.relative:.1e}"
    return Check(NAME, "fail" if problems else "pass", listed(problems) or detail, figures)


def _weight_problems(exported: Sequence[CodedWeight], placed: Sequence[CodedWeight]) -> Iterator[Unequal]:
    """Yield how the weights of two files differ."""
    names = [weight.name for weight in exported]
    if names != [weight.name for weight in placed]:
        differ = sorted(set(names) ^ {weight.name for weight in placed}) or names
        yield Unequal(f"the files multiply with other weights, or in another order: {listed(differ, 3)}")
        return
    compared = Comparison("the exported ones")
    for old, new in zip(exported, placed, strict=True):
        expected, found = exact_values(old), exact_values(new)
        if new.codes is None and new.dtype in ("FLOAT16", "BFLOAT16"):
            expected = rounded(expected, new.dtype)
        shape = f"{list(found.shape)}, exported as {list(expected.shape)}"
        if found.ndim != expected.ndim or any(a < b for a, b in zip(found.shape, expected.shape, strict=True)):
            yield Unequal(f"{old.name}: shape {shape}")
            continue
        inside = tuple(slice(size) for size in expected.shape)  # an axis may be padded with zeros to whole blocks
        if np.count_nonzero(found) != np.count_nonzero(found[inside]):
            yield Unequal(f"{old.name}: shape {shape}, and what was added is not 0")
        yield from compared.unequal(old.name, new.op, expected, found[inside])
        if old.consumed_axis != new.consumed_axis and old.op == new.op:
            axes = f"axis {new.consumed_axis}, exported over {old.consumed_axis}"
            yield Unequal(f"{old.name}: its {new.op} sums over {axes}")


def _quantizer_problems(exported: Sequence[StoredQuantizer], placed: Sequence[StoredQuantizer]) -> Iterator[str]:
    """Yield how the quantizers of activations of two files differ."""
    before, after = ({(one.name, one.output): one for one in some} for some in (exported, placed))
    for key in before.keys() | after.keys():
        old, new = before.get(key), after.get(key)
        if old is None or new is None:
            yield f"{key[0]}: quantizes '{key[1]}' in one of the files only"
        elif np.float32(old.scale).tobytes() != np.float32(new.scale).tobytes() or old.zero_point != new.zero_point:
            told = f"step {new.scale!r} around {new.zero_point}, exported"
            yield f"{key[0]}: {told} {old.scale!r} around {old.zero_point}"


def _segments(
    onnx: Path,
    placed: Path,
    quantizers: Sequence[StoredQuantizer],
    feeds: Sequence[Arrays],
    allowed: Tolerance,
    figures: dict[str, Any],
) -> tuple[Difference, list[str]]:
    """Compare the placed file, given the integers that the exported one makes, with the exported one.

    Returns:
        The difference of the outputs, and which integers are no rounding of what the exported file quantizes.
    """
    probed, read = _probed_session(onnx, quantizers)
    cut = cut_session(placed, [one.output for one in quantizers])
    chosen = behind_choices(load_graph(placed), [one.output for one in quantizers])
    names = output_names(reference_session(onnx))
    found = {
        one.output: StepDifference(one.name, share=FLOAT_SHARE if one.output in chosen else 0.0) for one in quantizers
    }
    reference, tested = [], []
    for feed in [part for whole in feeds for part in split(whole, 1, CHUNK)]:
        before = _run(probed, feed)
        answer = _run(cut, {**feed, **{one.output: before[one.output] for one in quantizers}})
        reference.append({name: before[name] for name in names})
        tested.append({name: answer[name] for name in names})
        for one in quantizers:
            call = Quantized(before[read[one.output]], before[one.output])
            found[one.output].add(call, answer[made(one.output)], one, allowed)
    figures |= step_figures(list(found.values()))
    problems = [one.told("the exported file's") for one in found.values() if not one.within]
    return compare(reference, tested, allowed), problems


def _probed_session(path: Path, quantizers: Sequence[StoredQuantizer]) -> tuple[ort.InferenceSession, dict[str, str]]:
    """Return a file in ONNX Runtime with what its quantizers read and make as outputs; and integers -> what is read."""
    model = load_model(path)
    wanted = {one.output for one in quantizers}
    read = {node.output[0]: node.input[0] for node in model.graph.node if node.output and node.output[0] in wanted}
    inputs = {value.name for value in model.graph.input}
    there = {value.name for value in model.graph.output} | inputs
    for name in dict.fromkeys([*read, *read.values()]):
        kind = TensorProto.INT8 if name in read else TensorProto.FLOAT
        if name not in there:
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    for name in inputs.intersection(read.values()):  # ONNX Runtime wants no output that is an input
        model.graph.node.append(helper.make_node("Identity", [name], [f"read({name})"]))
        model.graph.output.append(helper.make_tensor_value_info(f"read({name})", TensorProto.FLOAT, None))
    session = load_session(model.SerializeToString(), folder=path.parent)
    return session, {made_: f"read({name})" if name in inputs else name for made_, name in read.items()}


def _run(session: ort.InferenceSession, feed: Arrays) -> dict[str, Any]:
    names = output_names(session)
    return dict(zip(names, session.run(names, dict(feed)), strict=True))
