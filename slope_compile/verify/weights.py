"""`pattern` and `codes`: the weights in the ONNX bytes obey the laws, and are the checkpoint's, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from slope_compile.compression.codes import CodedTensor
from slope_compile.qdq.activations import StoredQuantizer
from slope_compile.qdq.checks import Finding, check_weight, compare
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.steps import quantizer_findings
from slope_compile.verify.verdict import Check, NotCheckedError, Once, Status, listed, reason

if TYPE_CHECKING:
    from torch import nn

Array = npt.NDArray[Any]
Codes = Mapping[str, CodedTensor]
NO_CODES = "the model holds no coded tensors"


def check_pattern(weights: Once[list[CodedWeight]], codes: Once[Codes] | None) -> Check:
    """`pattern`: n:m pattern, code range, scales and zero points of every weight in the file obey the laws.

    Args:
        weights: What the reader found in the file.
        codes: The checkpoint's coded tensors: they declare bits and pattern.
    """
    stored = weights()
    declared, why_not = _declared(codes)
    findings: list[Finding] = []
    for weight in stored:
        coded = declared.get(weight.name)
        bits, pattern = (None, None) if coded is None else (coded.bits, coded.pattern)
        findings += check_weight(weight, bits, pattern)
    with_pattern = sum(weight.name in declared and declared[weight.name].pattern is not None for weight in stored)
    figures = {"tensors": len(stored), "with_pattern": with_pattern, "failing": sorted({f.tensor for f in findings})}
    if findings:
        return Check("pattern", "fail", listed(_told(findings)), figures)
    if why_not:
        raise NotCheckedError(f"nothing declares bits and pattern: {why_not}")
    detail = (
        f"{len(stored)} weights read back, {with_pattern} with an n:m pattern: all within pattern, range and scale laws"
    )
    return Check("pattern", "pass", detail, figures)


def check_codes(
    weights: Once[list[CodedWeight]],
    codes: Once[Codes] | None,
    model: Once[nn.Module] | None,
    quantizers: Once[list[StoredQuantizer]] | None = None,
) -> Check:
    """`codes`: codes and scales of the file equal the checkpoint's, and codes × scale equals the trained weights.

    So do the steps of its quantizers of activations.

    Args:
        weights: What the reader found in the file.
        codes: The checkpoint's coded tensors, by weight name.
        model: The trained model, where torch and the checkpoint are there.
        quantizers: What the reader found of activations.
    """
    if codes is None:
        raise NotCheckedError("no coded tensors were given to compare with")
    expected = codes()
    findings = list(_file_findings(weights(), expected))
    if not expected and not findings:
        raise NotCheckedError(NO_CODES)
    trained, why_not = _trained(model, findings)
    if trained is not None:
        findings += list(_undeclared(trained, expected))
        findings += [finding for name, coded in expected.items() for finding in _trained_findings(trained, name, coded)]
        findings += quantizer_findings(quantizers() if quantizers else [], trained)
    count = sum(_numpy(coded.codes).size for coded in expected.values())
    figures = {
        "tensors": len(expected),
        "codes": count,
        "trained_weights_compared": trained is not None,
        "failing": sorted({finding.tensor for finding in findings}),
    }
    against = "and to the trained weights" if trained is not None else f"(trained weights not compared: {why_not})"
    status: Status = "fail" if findings else "pass"
    equal = f"{count} codes of {len(expected)} tensors and their scales are bit-equal to the checkpoint's {against}"
    return Check("codes", status, listed(_told(findings)) or equal, figures)


def _file_findings(stored: Iterable[CodedWeight], expected: Codes) -> Iterator[Finding]:
    """Yield where the file's weights differ from the checkpoint's coded tensors."""
    by_name: dict[str, list[CodedWeight]] = {}
    for weight in stored:
        by_name.setdefault(weight.name, []).append(weight)
    for name in sorted(expected.keys() | by_name.keys()):
        found = by_name.get(name, [])
        if name not in expected:
            if any(weight.codes is not None for weight in found):
                yield Finding(name, "extra", "coded in the file, but not in the checkpoint")
            continue
        coded = _as_numpy(expected[name])
        if not found:
            yield Finding(name, "missing", "no Conv, MatMul or Gemm of the file multiplies with it")
        for weight in found:
            turned = _in_checkpoint_layout(weight)
            findings = compare(turned, coded)
            yield from findings
            if findings and turned.stored.ndim > 1 and np.array_equal(turned.stored.swapaxes(0, 1), coded.codes):
                yield Finding(name, "layout", "the file holds the transposed tensor")
            if not findings:
                yield from _value_findings(turned, coded)


def _value_findings(weight: CodedWeight, coded: CodedTensor) -> Iterator[Finding]:
    """Yield where equal codes and scales still give other values: a zero point, or products rounded to float16."""
    unequal = _bits(weight.values()) != _bits(_numpy(coded.dequantize()))
    if unequal.any():
        zero_point = weight.zero_point is not None and weight.zero_point.any()
        why = "a zero point that is not 0" if zero_point else f"products rounded to {weight.value_dtype}"
        detail = f"{np.count_nonzero(unequal)} of {unequal.size} differ though codes and scale are equal: {why}"
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
    """Yield the compressed weights of the trained model for which there are no codes to compare with."""
    from slope_compile.compression.api import codes

    for name in codes(model).keys() - expected.keys():
        yield Finding(name, "codes", "compressed in the trained model, absent from its codes")


def _trained_findings(model: nn.Module, name: str, coded: CodedTensor) -> Iterator[Finding]:
    """Yield where codes × scale is not the weight that the trained layer multiplies with."""
    import torch

    module, _, attribute = name.rpartition(".")
    try:
        with torch.no_grad():
            weight = _numpy(getattr(model.get_submodule(module), attribute))
    except AttributeError:
        yield Finding(name, "trained", "the trained model has no such weight")
        return
    product = _numpy(coded.dequantize())
    if weight.shape != product.shape:
        yield Finding(name, "trained", f"shape {product.shape} in the checkpoint's codes, {weight.shape} in the model")
        return
    unequal = _bits(weight) != _bits(product)
    if unequal.any():
        detail = (
            f"codes x scale differs from the trained weight in {np.count_nonzero(unequal)} of {unequal.size} elements"
        )
        yield Finding(name, "trained", detail)


def _in_checkpoint_layout(weight: CodedWeight) -> CodedWeight:
    """Return the weight turned the way torch keeps it, output channels first, where its operator reads it otherwise.

    The operator decides, not the shape: a square matrix read the wrong way round must not look like the right one.
    """
    if weight.op not in ("MatMul", "Gemm") or weight.stored.ndim != 2 or weight.reduction_axis != 0:
        return weight
    return replace(
        weight,
        stored=weight.stored.T,
        scale=None if weight.scale is None else weight.scale.T,
        zero_point=None if weight.zero_point is None else weight.zero_point.T,
        axis=None if weight.axis is None else 1 - weight.axis,
        steps=(),
        consumed_axis=1,
    )


def _declared(codes: Once[Codes] | None) -> tuple[Codes, str]:
    if codes is None:
        return {}, "no coded tensors were given"
    try:
        declared = codes()
    except Exception as error:
        return {}, reason(error)
    return declared, "" if declared else NO_CODES


def _told(findings: Iterable[Finding]) -> list[str]:
    return [f"{finding.tensor}: {finding.rule}: {finding.detail}" for finding in findings]


def _as_numpy(coded: CodedTensor) -> CodedTensor:
    return replace(coded, codes=_numpy(coded.codes), scale=_numpy(coded.scale))


def _bits(array: Array) -> npt.NDArray[np.uint32]:
    # Bits, not values: NaN must equal itself, or a NaN in both would be reported as a difference.
    return np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)


def _numpy(array: Any) -> Array:
    """Return a torch tensor (wherever it is) or a numpy array as a numpy array."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
