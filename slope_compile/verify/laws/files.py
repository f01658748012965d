"""The laws on the files beside the exported one: the checkpoint, its coded tensors, the file that was placed.

Each is examined by itself, on its own bytes. What was examined is counted; what could not be is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto
from safetensors import SafetensorError

from slope_compile.codes_file import StoredCodes
from slope_compile.compression.groups import BLOCK
from slope_compile.errors import ArtifactError
from slope_compile.qdq.checks import Finding, check_pattern, check_scale, check_weight, check_zero_point
from slope_compile.qdq.floats import check_floats, iter_floats
from slope_compile.qdq.graph import Scope, is_standard, scopes
from slope_compile.qdq.reader import iter_weights, trace_constant
from slope_compile.qdq.tensors import load_graph, to_numpy
from slope_compile.tensor_file import FLOATS, TensorFile

# What torch calls a trained tensor or a norm's statistics; anything else in a checkpoint may be a mask.
_TRAINED = ("weight", "bias", "running_mean", "running_var", "step", "original", "original0", "original1", "scale")
_VARIANCE = "running_var"
# Operators that multiply with constants which are not read here: told, never passed over.
UNREAD = frozenset({
    "Attention", "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "Einsum", "FusedConv", "FusedGemm",
    "FusedMatMul", "GatherBlockQuantized", "GRU", "LSTM", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "MoE", "QAttention", "QGemm", "QLinearConv", "QLinearMatMul", "QMoE", "RNN",
})  # fmt: skip


class Declares(Protocol):
    """What declares bits and pattern of a weight."""

    @property
    def bits(self) -> int:
        """Of a code."""

    @property
    def pattern(self) -> tuple[int, int] | None:
        """(n, m), or None where the weight is dense."""


@dataclass(frozen=True)
class Artifacts:
    """The files whose laws are proved.

    Args:
        onnx: The exported file.
        placed: What the engine was built from.
        codes: The checkpoint's coded tensors.
        checkpoint: The checkpoint.
    """

    onnx: Path
    placed: Path | None = None
    codes: Path | None = None
    checkpoint: Path | None = None

    @classmethod
    def of(cls, onnx: Path, placed: Path | None, codes: object) -> Artifacts:
        """Return the files of a run or a bundle: the checkpoint lies beside its codes.

        Args:
            onnx: The exported file.
            placed: What the engine was built from, if anything was built.
            codes: The file of coded tensors; anything else is no file.
        """
        if not isinstance(codes, Path):
            return cls(onnx, placed)
        checkpoint = codes.with_name("checkpoint.safetensors")
        return cls(onnx, placed, codes, checkpoint if checkpoint.is_file() else None)


@dataclass
class Examined:
    """What came of a file.

    Args:
        figures: How many tensors and elements, by kind.
        findings: Broken laws.
        unread: What was not examined, in words.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def count(self, kind: str, elements: int) -> None:
        """Count a tensor."""
        row = self.figures.setdefault(kind, {"tensors": 0, "elements": 0})
        row["tensors"] += 1
        row["elements"] += elements


def examine_others(files: Artifacts, declared: Mapping[str, Declares]) -> dict[str, Examined]:
    """Examine every file but the exported one's weights, by file name.

    Args:
        files: What there is.
        declared: Bits and pattern of each weight.
    """
    found = {files.onnx.name: examine_graph(files.onnx)}
    if files.placed is not None and files.placed.is_file():  # where it is missing, `parity.placed` says so
        found[files.placed.name] = _attempted(files.placed, lambda path: examine_placed(path, declared))
    if files.codes is not None:
        found[files.codes.name] = _attempted(files.codes, _examine_codes)
    if files.checkpoint is not None:
        found[files.checkpoint.name] = _attempted(files.checkpoint, _examine_checkpoint)
    return found


def examine_graph(path: Path) -> Examined:
    """Examine the float tensors and the quantizers of activations of an ONNX file.

    Raises:
        ArtifactError: If it cannot be read.
    """
    model, found = load_graph(path), Examined()
    for one in iter_floats(model, path):
        found.count("floats", one.values.size)
        found.findings += check_floats(one.name, one.values, one.parameter, one.variance)
        del one
    others: dict[str, int] = {}
    for scope in scopes(model):
        for node in scope.nodes:
            quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
            if node.op_type in UNREAD or (quantizes and not is_standard(node, node.op_type)):
                name = node.op_type if is_standard(node, node.op_type) else f"{node.domain}.{node.op_type}"
                others[name] = others.get(name, 0) + 1
            elif quantizes:
                _examine_quantizer(scope, node, path, found)
            elif is_standard(node, "DynamicQuantizeLinear"):
                found.unread.append(f"the step of '{node.name}': computed as the graph runs")
    found.unread += [
        f"the weights of {count} {op}: such operators are not read" for op, count in sorted(others.items())
    ]
    return found


def _examine_quantizer(scope: Scope, node: NodeProto, path: Path, found: Examined) -> None:
    """Examine the steps of a quantizer of activations; those of weights are the weights' scales."""
    if not node.input or trace_constant(scope, node.input[0])[2] is not None:
        return
    found.figures["quantizers"] = found.figures.get("quantizers", 0) + 1
    for index, what in ((1, "step"), (2, "zero point")):
        if index >= len(node.input) or not node.input[index]:
            continue
        _, name, source = scope.find(node.input[index])
        if not isinstance(source, TensorProto):
            found.unread.append(f"the {what} of '{node.name}': computed as the graph runs")
            continue
        try:
            values = to_numpy(source, path, name)
        except ArtifactError as error:
            found.unread.append(f"the {what} of '{node.name}': {error.problem.rstrip('.')}")
            continue
        bad = ~(np.isfinite(values) & (values > 0)) if what == "step" else values != 0
        if bad.any():
            law = "positive and finite" if what == "step" else "0"
            first = values.reshape(-1)[int(np.argmax(bad))]
            if (name, what) not in {(one.tensor, one.rule) for one in found.findings}:  # told once, however many use it
                detail = f"of the activation that '{node.name}' takes is {first}, not {law}"
                found.findings.append(Finding(name, what, detail))


def examine_placed(path: Path, declared: Mapping[str, Declares]) -> Examined:
    """Examine a file that a backend gets: weights in other containers, some as constants with the zeros in place.

    Args:
        path: The file.
        declared: Bits and pattern of each weight.

    Raises:
        ArtifactError: If it cannot be read.
    """
    found = examine_graph(path)
    for weight in iter_weights(path):
        found.count("weights", weight.stored.size)
        coded = declared.get(weight.name)
        if coded is None:
            found.findings += [*check_scale(weight), *check_zero_point(weight)]
        elif weight.codes is None:  # constants with the zeros in place: sparse FP16
            found.findings += [] if coded.pattern is None else check_pattern(weight, *coded.pattern)
        else:
            found.findings += check_weight(weight, coded.bits, coded.pattern)
        del weight
    return found


def _examine_codes(path: Path) -> Examined:
    codes, found = StoredCodes(path), Examined()
    for name in codes:
        found.count("codes", codes.size(name))
        try:
            codes[name]
        except ArtifactError as error:
            found.findings.append(Finding(name, "law", error.problem))
    found.findings += [Finding(name, "extra", "a tensor that its header does not describe") for name in codes.strangers]
    return found


def _examine_checkpoint(path: Path) -> Examined:
    found = Examined()
    file = TensorFile(path)
    for name, entry in file.entries.items():
        if entry.dtype not in FLOATS:
            continue
        found.count("floats", entry.elements)
        for block in file.blocks(name, BLOCK):
            # A block alone: of a big tensor the first bad element's place is told within its block.
            if findings := trained_findings(name, block):
                found.findings += findings
                break
    return found


def trained_findings(name: str, values: npt.NDArray[Any]) -> list[Finding]:
    """Return what floats of a trained model break: no NaN, no infinity in a parameter, no negative variance.

    Args:
        name: Of the tensor in the state dict; its end says what it is.
        values: Its numbers, or some of them.
    """
    last = name.rpartition(".")[2]
    return check_floats(name, values, last in _TRAINED, last == _VARIANCE)


def _attempted(path: Path, examine: Any) -> Examined:
    """Return what came of a file; one that cannot be read breaks the law that it should be."""
    try:
        found: Examined = examine(path)
        return found
    except (ArtifactError, SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        problem = error.problem if isinstance(error, ArtifactError) else f"{path.name}: {error}"
        return Examined(findings=[Finding(path.name, "file", problem)])
