"""`packed`: the packed file holds what was trained, bit for bit, and its codes obey the laws.

One tensor is in memory at a time, and the checkpoint's of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.codes_file import StoredCodes
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError
from slope_compile.pack.kept import kept_of_checkpoint
from slope_compile.pack.read import Packed, open_packed
from slope_compile.pack.sizes import CODED
from slope_compile.qdq.checks import Finding, count_where
from slope_compile.verify.laws.files import trained_findings
from slope_compile.verify.verdict import Check, T, listed

Codes = Mapping[str, CodedTensor]
_MAY_BE_NAN = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "C64"})  # every type that can be


def check_packed(path: Path, train: Path) -> Check:
    """`packed` of a run: every tensor of its packed file is the checkpoint's, and none of the checkpoint's is missing.

    Args:
        path: The packed file.
        train: The folder of the checkpoint and its coded tensors.

    Raises:
        ArtifactError: If a file cannot be read at all.
    """
    packed = open_packed(path)
    if packed.kind != "model":
        raise ArtifactError(f"{path.name} holds an ONNX file, not what the run trained.", "Pack the run again.")
    expected = StoredCodes(train / "codes.safetensors")
    checkpoint = train / "checkpoint.safetensors"
    findings = [*_coded_findings(packed, expected), *_other_findings(packed, checkpoint, expected)]
    detail = f"{_counted(packed)} are the checkpoint's, bit for bit; the codes obey the laws"
    return _check(packed, findings, detail)


def check_packed_model(packed: Packed) -> Check:
    """`packed` of a lone packed model: every byte of it is read; codes and floats obey the laws.

    A file without coded tensors fails: nothing that was compressed is in it, so no law is proved by reading it.
    """
    findings: list[Finding] = []
    if not packed.codes:
        findings.append(Finding(packed.path.name, "codes", "no coded tensor is in it, so there is no law to prove"))
    for name in packed.codes:
        _get(packed.codes, name, "packed", findings)
    for name in packed.tensors:
        values = _get(packed.tensors, name, "packed", findings)
        if values is not None and packed.tensors.dtype(name) in _MAY_BE_NAN:
            findings += trained_findings(name, values.view(np.float32) if values.dtype.kind == "c" else values)
    detail = f"{_counted(packed)} have the sha256 of the header and obey the laws"
    return _check(packed, findings, detail)


def check_packed_onnx(packed: Packed, folder: Path) -> Check:
    """`packed` of a lone packed ONNX file, which is restored into a folder: it is the one that was packed, by sha256.

    Raises:
        ArtifactError: If it is not.
        StorageError: If the folder cannot be written.
    """
    packed.restore(folder)
    restored = f"{', '.join(packed.files)} with {len(packed.sizes.tensors)} tensors"
    return _check(packed, [], f"{restored} restored as packed, by sha256")


def _check(packed: Packed, findings: list[Finding], detail: str) -> Check:
    figures: dict[str, Any] = {
        "bytes": packed.path.stat().st_size,
        "tensors": len(packed.sizes.tensors),
        "codes": _codes(packed),
        "failing": sorted({finding.tensor for finding in findings}),
    }
    return Check("packed", "fail" if findings else "pass", listed(map(str, findings)) or detail, figures)


def _codes(packed: Packed) -> int:
    return sum(row.elements for row in packed.sizes.tensors if row.dtype == CODED)


def _counted(packed: Packed) -> str:
    coded = f"{_codes(packed)} codes of {len(packed.codes)} tensors and their scales"
    return f"{coded}, and {len(packed.tensors)} other tensors"


def _get(tensors: Mapping[str, T], name: str, whose: str, findings: list[Finding]) -> T | None:
    """Return a tensor; one that cannot be had, or breaks a law, is a finding."""
    try:
        return tensors[name]
    except ArtifactError as error:
        findings.append(Finding(name, whose, error.problem))
        return None


def _coded_findings(packed: Packed, expected: Codes) -> list[Finding]:
    """Return where the coded tensors differ; reading one proves its section's sha256 and the laws."""
    ours, theirs = set(packed.codes), set(expected)  # asked of the mappings themselves, each would be read
    findings = _absent("coded in", ours, theirs)
    for name in sorted(ours & theirs):
        found = _get(packed.codes, name, "packed", findings)
        trained = _get(expected, name, "checkpoint", findings)
        if found is None or trained is None:
            continue
        for what in ("bits", "axis", "pattern"):
            here, there = getattr(found, what), getattr(trained, what)
            if here != there:
                findings.append(Finding(name, what, f"{here} in the packed file, {there} as trained"))
        findings += _array_findings(name, "codes", np.asarray(found.codes), np.asarray(trained.codes))
        findings += _array_findings(name, "scale", np.asarray(found.scale), np.asarray(trained.scale))
    return findings


def _other_findings(packed: Packed, checkpoint: Path, expected: Codes) -> list[Finding]:
    """Return where tensors without codes differ; what of a checkpoint is packed is for `pack` to say."""
    try:
        kept = kept_of_checkpoint(checkpoint, expected)
    except ArtifactError as error:  # nothing could be packed of it
        return [Finding(checkpoint.name, "checkpoint", error.problem)]
    ours, theirs = set(packed.tensors), set(kept)
    findings = _absent("in", ours, theirs)
    for name in sorted(ours & theirs):
        found = _get(packed.tensors, name, "packed", findings)
        trained = _get(kept, name, "checkpoint", findings)
        if found is not None and trained is not None:
            findings += _array_findings(name, "values", found, trained)
    return findings


def _absent(where: str, found: AbstractSet[str], expected: AbstractSet[str]) -> list[Finding]:
    extra = f"{where} the packed file, and not {where} the checkpoint"
    missing = f"{where} the checkpoint, and not {where} the packed file"
    return [
        *(Finding(name, "extra", extra) for name in sorted(found - expected)),
        *(Finding(name, "missing", missing) for name in sorted(expected - found)),
    ]


def _array_findings(name: str, what: str, found: npt.NDArray[Any], trained: npt.NDArray[Any]) -> list[Finding]:
    """Return where two arrays differ in type, shape or any bit: NaN equals itself, and 0 is not -0."""
    if found.dtype != trained.dtype or found.shape != trained.shape:
        ours, theirs = (f"{array.dtype} {list(array.shape)}" for array in (found, trained))
        return [Finding(name, what, f"{ours} in the packed file, {theirs} as trained")]
    count, first = count_where(np.not_equal, _bits(found), _bits(trained))
    if not count:
        return []
    return [Finding(name, what, f"{count} of {found.size} differ from the trained ones, the first at {first}")]


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array's bits as integers of its width."""
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
