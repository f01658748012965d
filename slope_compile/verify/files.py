"""verify.json and junit.xml: the same verdict twice, byte for byte the same for the same verdict (no times)."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from slope_compile.artifacts import storage_errors
from slope_compile.verify.verdict import Check, Verdict


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Write `verify.json` and `junit.xml` into a folder.

    Raises:
        StorageError: If the file system refuses.
    """
    with storage_errors(folder):
        text = json.dumps(verdict.to_json(), indent=1, allow_nan=False) + "\n"
        (folder / "verify.json").write_text(text, encoding="utf-8")
        (folder / "junit.xml").write_bytes(junit(verdict))


def junit(verdict: Verdict) -> bytes:
    """Return the verdict as JUnit XML: one test case a check; `not checked` is `skipped`, with the reason."""
    count = {status: sum(c.status == status for c in verdict.checks) for status in ("fail", "not checked")}
    suite = ElementTree.Element(
        "testsuite",
        name="slope-compile verify",
        tests=str(len(verdict.checks)),
        failures=str(count["fail"]),
        errors="0",
        skipped=str(count["not checked"]),
    )
    for check in verdict.checks:
        _add_case(suite, check)
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return bytes(text) + b"\n"


def _add_case(suite: ElementTree.Element, check: Check) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname="slope_compile.verify", name=_xml(check.name))
    if check.status == "fail":
        ElementTree.SubElement(case, "failure", message=_xml(check.detail))
    elif check.status == "not checked":
        ElementTree.SubElement(case, "skipped", message=_xml(check.detail))
    figures = json.dumps(check.to_json()["figures"], indent=1, allow_nan=False)
    ElementTree.SubElement(case, "system-out").text = _xml(f"{check.detail}\n{figures}")


def _xml(text: str) -> str:
    # A damaged file can put any character into a tensor's name; XML 1.0 cannot hold most control characters.
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
