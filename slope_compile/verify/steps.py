"""Quantized activations of the trained model and of ONNX Runtime, integer by integer.

Letters: f - the share of integers that differ, d - by how many levels at most.

Two implementations of one network differ in the last bits of each sum; where a value lies that close to the middle
between two levels, they round to different ones. So integers may differ, but few of them, and hardly by more than one.
A wrong scale, a quantizer that is missing or a wrong range moves a large share, which no tolerance of outputs would
tell from rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from slope_compile.qdq.activations import StoredQuantizer, stored_quantizers
from slope_compile.qdq.checks import Finding
from slope_compile.qdq.tensors import load_model
from slope_compile.verify.runners import FATAL, Array, Arrays, TorchRunner, infer, infer_onnx
from slope_compile.verify.tolerance import FLIPPED
from slope_compile.verify.verdict import significant

if TYPE_CHECKING:
    from torch import nn

    from slope_compile.compression.activations import ActivationQuantizer

LARGEST_SHARE = 10 * FLIPPED  # in one quantizer; over all of them FLIPPED holds
CHUNK = 4  # samples at a time: all integers of all layers are held at once


@dataclass(frozen=True)
class StepDifference:
    """How the integers of one quantizer differ.

    Args:
        name: The quantizer, `layer1.0.conv1.input`.
        elements: How many were compared.
        different: How many differ.
        largest: By how many levels, at most.
    """

    name: str
    elements: int
    different: int
    largest: int

    @property
    def share(self) -> float:
        """The share f that differs."""
        return self.different / max(self.elements, 1)


def step_problems(
    path: Path, model: nn.Module, twin: ort.InferenceSession, feeds: Sequence[Arrays], figures: dict[str, Any]
) -> list[str]:
    """Return what is wrong with the quantizers of a file, and note what was measured in `figures`.

    Args:
        path: The ONNX file.
        model: The trained model.
        twin: The file in ONNX Runtime, as it is.
        feeds: Inputs, one mapping a feed.
        figures: Gets `quantizers`, `step_share` (all that differ), `step_share_worst` and `step_levels`.
    """
    found, missing = compare_steps(path, model, twin, feeds)
    problems = [f"{name}: the trained model quantizes here, the file does not" for name in missing]
    if not found:
        return problems
    share = sum(one.different for one in found) / sum(one.elements for one in found)
    worst = max(found, key=lambda one: one.share)
    figures |= {
        "quantizers": len(found),
        "step_share": significant(share),
        "step_share_worst": significant(worst.share),
        "step_levels": max(one.largest for one in found),
    }
    if share > FLIPPED:
        problems.append(f"{share:.2%} of all quantized activations differ, allowed {FLIPPED:.0%}")
    if worst.share > LARGEST_SHARE:
        told = f"{worst.share:.1%} of the integers differ, by up to {worst.largest} levels"
        problems.append(f"{worst.name}: {told}; allowed {LARGEST_SHARE:.0%}")
    return problems


def quantizer_findings(stored: Sequence[StoredQuantizer], model: nn.Module) -> Iterator[Finding]:
    """Yield where a file's quantizers of activations are not the trained ones, bit for bit."""
    from slope_compile.compression.activations import trained_quantizers

    trained = trained_quantizers(model)
    for one in stored:
        expected = trained.get(one.name)
        if expected is None:
            yield Finding(one.name, "extra", "quantized in the file, but not in the trained model")
            continue
        if np.float32(one.scale).tobytes() != np.float32(expected.scale).tobytes():
            yield Finding(one.name, "step", f"is {one.scale!r} in the file and {expected.scale!r} in the trained model")
        # A higher low end is a Relu of the model's own: nothing below it is left to clip.
        if one.zero_point or one.high != expected.high or one.low < expected.low:
            told = f"levels {one.low} to {one.high} around {one.zero_point}, trained {expected.low} to {expected.high}"
            yield Finding(one.name, "range", told)


def compare_steps(
    path: Path, model: nn.Module, twin: ort.InferenceSession, feeds: Sequence[Arrays]
) -> tuple[list[StepDifference], list[str]]:
    """Compare every quantizer of a file with the trained one, call by call, where both make as many integers.

    Returns:
        The differences; and the names of those that the trained model uses and the file lacks.

    Args:
        path: The ONNX file.
        model: The trained model; its mode is left as it was.
        twin: The file in ONNX Runtime, as it is.
        feeds: Inputs, one mapping a feed.
    """
    stored = stored_quantizers(path)
    session = _session(path, stored) if stored else twin
    found: dict[str, list[int]] = {}
    used: dict[str, None] = {}
    for feed in (part for whole in feeds for part in _chunks(whole)):
        with _recorded(model) as recorded:
            infer(TorchRunner(model, twin), [feed])
        used |= dict.fromkeys(recorded)
        (answer,) = infer_onnx(session, [feed], "onnxruntime")
        for quantizer, trained in zip(stored, _in_file_order(stored, recorded), strict=True):
            made = answer[quantizer.output]
            if trained is None or trained.shape != made.shape:
                continue
            distance = np.abs(trained.astype(np.int16) - made.astype(np.int16))
            sums = found.setdefault(quantizer.name, [0, 0, 0])
            sums[0] += distance.size
            sums[1] += int(np.count_nonzero(distance))
            sums[2] = max(sums[2], int(distance.max(initial=0)))
    names = {one.name for one in stored}
    return [StepDifference(name, *sums) for name, sums in found.items()], [name for name in used if name not in names]


def _session(path: Path, stored: Sequence[StoredQuantizer]) -> ort.InferenceSession:
    """Return the file in ONNX Runtime, optimizations disabled, with the integers of all quantizers as outputs."""
    model = load_model(path)
    del model.graph.output[:]
    for name in dict.fromkeys(one.output for one in stored):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = FATAL
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, list[Array]]]:
    """Keep what each quantizer of a model makes while it runs: name -> one array of integers a call."""
    from slope_compile.compression.activations import activation_quantizers
    from slope_compile.compression.lsq import effective_step

    made: dict[str, list[Array]] = {}
    handles = []

    def keep(name: str, quantizer: ActivationQuantizer) -> Any:
        read: list[Any] = []

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            # Layers that share a quantizer hand it the same tensor: the file quantizes that once.
            if not any(arguments[0] is other for other in read):
                read.append(arguments[0])
                levels = (output / effective_step(quantizer.step)).round()
                made.setdefault(name, []).append(levels.cpu().numpy().astype(np.int8))

        return hook

    try:
        for name, quantizer in activation_quantizers(model):
            handles.append(quantizer.register_forward_hook(keep(name, quantizer)))
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _in_file_order(stored: Sequence[StoredQuantizer], recorded: Mapping[str, list[Array]]) -> Iterator[Array | None]:
    """Yield the trained integers of each quantizer of the file, None where the calls are not as many."""
    count: dict[str, int] = {}
    times = {one.name: sum(other.name == one.name for other in stored) for one in stored}
    for one in stored:
        index = count[one.name] = count.get(one.name, -1) + 1
        calls = recorded.get(one.name, [])
        yield calls[index] if len(calls) == times[one.name] else None


def _chunks(feed: Arrays) -> Iterator[Arrays]:
    samples = next(iter(feed.values())).shape[0]
    for start in range(0, samples, CHUNK):
        yield {name: array[start : start + CHUNK] for name, array in feed.items()}
