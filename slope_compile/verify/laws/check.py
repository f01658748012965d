"""`pattern` and `codes`: the weights in the ONNX bytes obey the laws, and are the checkpoint's, bit for bit.

One weight is in memory at a time, and with it the checkpoint's codes of the same one: 2 bytes a code of the largest
tensor, 5 where the file stores it as floats. What else is made is made a block at a time (`groups.BLOCK` elements).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from slope_compile.codes_file import StoredCodes
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError
from slope_compile.qdq.activations import StoredQuantizer
from slope_compile.qdq.checks import Finding, check_weight, compare, count_where, float_bits
from slope_compile.qdq.tensors import UnreadTypeError
from slope_compile.qdq.weights import CodedWeight, row_blocks
from slope_compile.verify.chain.golden import Golden
from slope_compile.verify.laws.files import Artifacts, examine_others
from slope_compile.verify.laws.kept import KeptDigests
from slope_compile.verify.laws.layer_list import LayerList
from slope_compile.verify.parity.steps import quantizer_findings
from slope_compile.verify.verdict import Check, NotCheckedError, Once, Status, listed, reason

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]
Codes = Mapping[str, CodedTensor]
Weights = Callable[[], Iterable[CodedWeight]]  # a list that is there, or `iter_weights`
NO_CODES = "the model holds no coded tensors"


class Declared(NamedTuple):
    """Bits and pattern that a weight must have, as an export's layer list says it."""

    bits: int
    pattern: tuple[int, int] | None


def check_pattern(
    weights: Weights,
    codes: Once[Codes] | None,
    layers: Once[Mapping[str, Declared]] | None = None,
    files: Artifacts | None = None,
) -> Check:
    """`pattern`: n:m pattern, code range, scales and zero points of every weight in the file obey the laws.

    So do, in every file that is given: coded tensors of the checkpoint, weights of the placed file, steps of
    activations; and no float tensor holds NaN, or a parameter an infinity.

    Args:
        weights: Gives what the reader finds in the file.
        codes: The checkpoint's coded tensors: they declare bits and pattern.
        layers: The layer list of the export, which declares them where there are no such tensors.
        files: The file itself and those beside it; None: only `weights` are examined.
    """
    declared, why_not = _declared(codes if codes is not None else layers)
    try:
        seen = _seen(weights(), declared)
    except UnreadTypeError as error:
        if declared:  # it is said to be of a type that is read
            raise
        raise NotCheckedError(error.problem) from None
    findings = seen.findings
    if codes is None:  # with them, a weight that is not in the file is a finding of `codes`
        absent = declared.keys() - seen.names
        findings += [Finding(name, "name", "declared by the layer list, not in the file") for name in sorted(absent)]
    if files is not None and codes is not None and why_not:
        files = replace(files, codes=None)  # what is wrong with that file is for `codes` to say
    others = {} if files is None else examine_others(files, declared)
    failing = {finding.tensor for finding in findings}.union(*({f.tensor for f in o.findings} for o in others.values()))
    problems = [str(finding) for finding in findings]
    problems += [f"{name}: {finding}" for name, other in others.items() for finding in other.findings]
    unread = [f"{name}: {what}" for name, other in others.items() for what in other.unread]
    figures: dict[str, Any] = {
        "tensors": seen.tensors, "with_pattern": seen.with_pattern, "failing": sorted(failing),
    }  # fmt: skip
    if files is not None:
        own = {files.onnx.name: {"weights": {"tensors": seen.tensors, "elements": seen.elements}}}
        figures["files"] = {name: own.get(name, {}) | other.figures for name, other in others.items()}
        figures["not_examined"] = unread
    if problems:
        return Check("pattern", "fail", listed(problems), figures)
    rest = f"; not examined: {listed(unread)}" if unread else ""
    if why_not:
        laws = f"; scales and zero points of {seen.coded} coded weights obey the laws" if seen.coded else ""
        return Check("pattern", "not checked", f"nothing declares bits and pattern: {why_not}{laws}{rest}", figures)
    read = f"{seen.tensors} weights read back, {seen.with_pattern} with an n:m pattern"
    detail = f"{read}: all within pattern, range and scale laws"
    beside = [name for name in others if files is not None and name != files.onnx.name]
    return Check("pattern", "pass", detail + (f"; so are {', '.join(beside)}" if beside else "") + rest, figures)


@dataclass
class _Seen:
    """What was counted while the weights of a file went by."""

    findings: list[Finding] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    tensors: int = 0
    with_pattern: int = 0
    elements: int = 0
    coded: int = 0


def _seen(weights: Iterable[CodedWeight], declared: Mapping[str, CodedTensor | Declared]) -> _Seen:
    found = _Seen()
    for weight in weights:
        coded = declared.get(weight.name)
        bits, pattern = (None, None) if coded is None else (coded.bits, coded.pattern)
        found.findings += check_weight(weight, bits, pattern)
        found.names.add(weight.name)
        found.tensors += 1
        found.elements += weight.stored.size
        found.with_pattern += pattern is not None
        found.coded += weight.codes is not None
        del weight  # the next one is read into what this one had
    return found


def check_codes(
    weights: Weights,
    codes: Once[Codes] | None,
    model: Once[nn.Module] | None,
    quantizers: Once[list[StoredQuantizer]] | None = None,
    layers: LayerList | None = None,
    golden: Once[Golden] | None = None,
) -> Check:
    """`codes`: codes and scales of the file equal the checkpoint's, and codes × scale equals the trained weights.

    So do the steps of its quantizers of activations; and the export's layer list says of all of them what is so. Of a
    file that lies alone, codes and scales have the digests that the golden samples have kept since its export.

    Args:
        weights: Gives what the reader finds in the file.
        codes: The checkpoint's coded tensors, by weight name.
        model: The trained model, where torch and the checkpoint are there.
        quantizers: What the reader found of activations.
        layers: The export's layer list, if there should be one.
        golden: The golden samples, if there are any.
    """
    if codes is None:
        return _alone(weights, layers, golden)
    expected = codes()
    stored = weights() if layers is None else layers.watched(weights())
    findings = list(_file_findings(stored, expected))
    trained, why_not = _trained(model, findings)
    findings += [] if layers is None else layers.findings(expected, trained)
    if not expected and not findings:
        raise NotCheckedError(NO_CODES)
    if trained is not None:
        findings += list(_undeclared(trained, expected))
        for name in expected:
            findings += _trained_findings(trained, name, expected)
        findings += quantizer_findings(quantizers() if quantizers else [], trained)
    count = sum(_size(expected, name) for name in expected)
    figures = {
        "tensors": len(expected),
        "codes": count,
        "trained_weights_compared": trained is not None,
        "failing": sorted({finding.tensor for finding in findings}),
    }
    against = "and to the trained weights" if trained is not None else f"(trained weights not compared: {why_not})"
    status: Status = "fail" if findings else "pass"
    equal = f"{count} codes of {len(expected)} tensors and their scales are bit-equal to the checkpoint's {against}"
    return Check("codes", status, listed(map(str, findings)) or equal, figures)


def _alone(weights: Weights, layers: LayerList | None, golden: Once[Golden] | None) -> Check:
    """Hold a file of which no checkpoint's codes are there against what the export wrote beside it."""
    kept, why_not = _kept(golden)
    passing = kept.watched(weights())
    for weight in passing if layers is None else layers.watched(passing):
        del weight
    findings = kept.findings() + ([] if layers is None else layers.findings(None, None, kept.declared))
    why_not = why_not or kept.why_not_told
    figures = {
        "tensors": kept.tensors,
        "codes": kept.codes,
        "trained_weights_compared": False,
        "failing": sorted({finding.tensor for finding in findings}),
    }
    if findings:
        return Check("codes", "fail", listed(map(str, findings)), figures)
    if why_not:
        agrees = "" if layers is None else f"; {layers.name} agrees with the file"
        raise NotCheckedError(f"no coded tensors were given to compare with, and {why_not}{agrees}")
    equal = f"{kept.codes} codes of {kept.tensors} tensors and their scales"
    return Check("codes", "pass", f"{equal} have the digests that {kept.name} has kept since export", figures)


def _kept(golden: Once[Golden] | None) -> tuple[KeptDigests, str]:
    """Return the digests that golden samples keep; or none, and why."""
    if golden is None:
        return KeptDigests.none(), "there are no golden samples"
    try:
        return KeptDigests(golden()), ""
    except ArtifactError as error:  # for the checks that compare outputs to fail
        return KeptDigests.none(), error.problem


def _file_findings(stored: Iterable[CodedWeight], expected: Codes) -> list[Finding]:
    """Return where the file's weights differ from the checkpoint's coded tensors, by name."""
    findings: list[Finding] = []
    names: set[str] = set()
    for weight in stored:
        name = weight.name
        if name in expected:
            findings += _differences(weight, expected)
        elif weight.codes is not None and name not in names:
            findings.append(Finding(name, "extra", "coded in the file, but not in the checkpoint"))
        names.add(name)
        del weight  # the next one is read into what this one had
    for name in expected.keys() - names:
        findings.append(Finding(name, "missing", "no Conv, MatMul or Gemm of the file multiplies with it"))
    return sorted(findings, key=lambda finding: finding.tensor)


def _differences(weight: CodedWeight, expected: Codes) -> list[Finding]:
    """Return how a weight differs from the checkpoint's tensor of its name."""
    try:
        coded = _as_numpy(expected[weight.name])
    except ArtifactError as error:  # the checkpoint's own tensor breaks a law
        return [Finding(weight.name, "checkpoint", error.problem)]
    turned = weight.as_trained()
    findings = compare(turned, coded)
    if findings and _is_transposed(turned.stored, coded.codes):
        findings.append(Finding(weight.name, "layout", "the file holds the transposed tensor"))
    return findings or list(_value_findings(turned, coded))


def _is_transposed(stored: Array, codes: Array) -> bool:
    if stored.ndim < 2 or stored.swapaxes(0, 1).shape != codes.shape:
        return False
    return not count_where(np.not_equal, stored.swapaxes(0, 1), codes)[0]


def _value_findings(weight: CodedWeight, coded: CodedTensor) -> Iterator[Finding]:
    """Yield where equal codes and scales still give other values: a zero point, or products rounded to float16."""
    zero_point = weight.zero_point is not None and bool(weight.zero_point.any())
    if not zero_point and weight.value_dtype == "FLOAT":
        return  # the same product of the same float32 numbers
    scale = np.broadcast_to(
        coded.scale.reshape([-1 if axis == coded.axis else 1 for axis in range(coded.codes.ndim)]), coded.codes.shape
    )
    unequal = 0
    for rows in row_blocks(weight):
        unequal += int(
            np.count_nonzero(float_bits(weight.rows(rows).values()) != float_bits(coded.codes[rows] * scale[rows]))
        )
    if unequal:
        why = "a zero point that is not 0" if zero_point else f"products rounded to {weight.value_dtype}"
        detail = f"{unequal} of {coded.codes.size} differ though codes and scale are equal: {why}"
        yield Finding(weight.name, "values", detail)


def _trained(model: Once[nn.Module] | None, findings: list[Finding]) -> tuple[nn.Module | None, str]:
    """Return the trained model, or None and why; a damaged checkpoint is a finding."""
    if model is None:
        return None, "no model was given"
    try:
        return model(), ""
    except NotCheckedError as error:
        return None, str(error)
    except Exception as error:
        findings.append(Finding("the trained model", "checkpoint", reason(error)))
        return None, reason(error)


def _undeclared(model: nn.Module, expected: Codes) -> Iterator[Finding]:
    """Yield the compressed weights of the trained model whose codes are absent, or declared to obey other laws."""
    from slope_compile.compression.api import codes

    for name, trained in codes(model).items():
        if name not in expected:
            yield Finding(name, "codes", "compressed in the trained model, absent from its codes")
            continue
        if isinstance(expected, StoredCodes):
            bits, pattern = expected.bits(name), expected.pattern(name)
        else:
            bits, pattern = expected[name].bits, expected[name].pattern
        if (bits, pattern) != (trained.bits, trained.pattern):
            told = f"{bits} bits and pattern {pattern}, trained with {trained.bits} and {trained.pattern}"
            yield Finding(name, "declared", told)


def _trained_findings(model: nn.Module, name: str, expected: Codes) -> Iterator[Finding]:
    """Yield where codes × scale is not the weight that the trained layer multiplies with."""
    import torch

    module, _, attribute = name.rpartition(".")
    try:
        with torch.no_grad():
            weight = _numpy(getattr(model.get_submodule(module), attribute))
    except AttributeError:
        yield Finding(name, "trained", "the trained model has no such weight")
        return
    try:
        coded = _as_numpy(expected[name])
    except ArtifactError as error:
        yield Finding(name, "checkpoint", error.problem)
        return
    if weight.shape != coded.codes.shape:
        shapes = f"shape {coded.codes.shape} in the checkpoint's codes, {weight.shape} in the model"
        yield Finding(name, "trained", shapes)
        return
    shape = [-1 if axis == coded.axis else 1 for axis in range(coded.codes.ndim)]
    scale = np.broadcast_to(coded.scale.reshape(shape), coded.codes.shape)
    unequal, _ = count_where(lambda w, c, s: float_bits(w) != float_bits(c * s), weight, coded.codes, scale)
    if unequal:
        detail = f"codes x scale differs from the trained weight in {unequal} of {weight.size} elements"
        yield Finding(name, "trained", detail)


def _declared(
    codes: Once[Codes] | Once[Mapping[str, Declared]] | None,
) -> tuple[Mapping[str, CodedTensor | Declared], str]:
    """Return bits and pattern by name, of a file from its header alone; or why nobody declares them."""
    if codes is None:
        return {}, "no coded tensors were given"
    try:
        declared = codes()
    except Exception as error:
        return {}, reason(error)
    if isinstance(declared, StoredCodes):
        declared = {name: Declared(declared.bits(name), declared.pattern(name)) for name in declared}
    return declared, "" if declared else NO_CODES


def _size(codes: Codes, name: str) -> int:
    return codes.size(name) if isinstance(codes, StoredCodes) else int(_numpy(codes[name].codes).size)


def _as_numpy(coded: CodedTensor) -> CodedTensor:
    return replace(coded, codes=_numpy(coded.codes), scale=_numpy(coded.scale))


def _numpy(array: Any) -> Array:
    """Return a torch tensor (wherever it is) or a numpy array as a numpy array."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
