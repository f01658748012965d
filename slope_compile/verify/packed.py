"""Verification of a packed file that belongs to no run, with what lies beside it.

m.slope                  the file
m.golden.safetensors     of an ONNX file: inputs, and what the trained model gave for them
m.layers.json            of an ONNX file: bits and pattern that each weight must have
m.verify/                what `verify` writes
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from slope_compile.errors import ArtifactError, LaterFormatError, StorageError
from slope_compile.events import Events
from slope_compile.pack.read import Packed, open_packed
from slope_compile.verify.files import write_verdict
from slope_compile.verify.laws.packed import check_packed_model, check_packed_onnx
from slope_compile.verify.model import verify_model
from slope_compile.verify.single import declared_beside, default_out, golden_beside, listed_beside, results
from slope_compile.verify.verdict import Check, Verdict, attempt, reason

INTEGRITY = frozenset({"packed"})  # of an ONNX file: that it was restored as it was packed
NO_CHECKPOINT = "the checkpoint is not here; `verify` of the run that the file was packed in compares them"


def verify_packed(
    file: Path, *, out: Path | None = None, required: tuple[str, ...] = (), events: Events | None = None
) -> Verdict:
    """Verify a packed file, and write what was found into a folder of its own.

    A model's codes and floats are read and judged; an ONNX file is restored, and then verified as a lone one is: it
    passes only where that one would, since the bytes of an unknown model prove nothing of it.

    Args:
        file: The file.
        out: The folder; default: beside the file.
        required: Checks that must pass.
        events: Who is told.

    Raises:
        ArtifactError: If there is no such file.
        LaterFormatError: If a later version packed it: it cannot be judged here.
        StorageError: If the folder holds something else, or cannot be written.
    """
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "is not a file" if file.exists() else "does not exist"
        raise ArtifactError(f"{file} {what}.", "Check the path.")
    told = events or Events()
    with results(out or default_out(file)) as partial, tempfile.TemporaryDirectory(prefix="slope-compile.") as restored:
        verdict = replace(_verdict(file, Path(restored), partial, told), required=required)
        write_verdict(partial, verdict)
    return verdict


def _verdict(file: Path, restored: Path, out: Path, events: Events) -> Verdict:
    try:
        packed = open_packed(file)
    except LaterFormatError:
        raise
    except ArtifactError as error:
        return _told(events, Check("packed", "fail", reason(error)))
    if packed.kind == "model":
        found = attempt("packed", lambda: check_packed_model(packed))
        return _told(events, Check("codes", "not checked", NO_CHECKPOINT), found)
    found = _restored(packed, restored)
    if found.status == "fail":
        return _told(events, found)
    verdict = verify_model(
        restored / packed.files[0],
        golden=golden_beside(file),
        declared=declared_beside(file),
        layers=listed_beside(file),
        packed=lambda: found,
        out=out,
        events=events,
    )
    return replace(verdict, integrity=INTEGRITY)


def _restored(packed: Packed, folder: Path) -> Check:
    """Restore an ONNX file; a full disk is no fault of the file's."""
    try:
        return check_packed_onnx(packed, folder)
    except StorageError:
        raise
    except Exception as error:
        return Check("packed", "fail", reason(error))


def _told(events: Events, *checks: Check) -> Verdict:
    for check in checks:
        events.emit("check", name=check.name, status=check.status, detail=check.detail)
    return Verdict(checks)
