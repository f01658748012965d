"""verify.json and junit.xml: the same verdict twice, byte for byte the same for the same verdict (no times)."""

from __future__ import annotations

import json
from pathlib import Path

from slope_compile.artifacts import storage_errors
from slope_compile.verify.ci.junit import junit
from slope_compile.verify.ci.verified import Verified
from slope_compile.verify.verdict import Verdict


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Write `verify.json` and `junit.xml` into a folder.

    Raises:
        StorageError: If the file system refuses.
    """
    with storage_errors(folder):
        text = json.dumps(verdict.to_json(), indent=1, allow_nan=False) + "\n"
        (folder / "verify.json").write_text(text, encoding="utf-8")
        (folder / "junit.xml").write_bytes(junit(Verified("onnx", "", verdict.to_json())))
