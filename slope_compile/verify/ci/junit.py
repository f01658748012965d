"""JUnit XML: one suite a target, one case a check or requirement; `not checked` is `skipped`, with the reason.

Of the forms in use this is the one that Jenkins, GitLab and GitHub's test reporters share: testsuites > testsuite >
testcase > failure | skipped, system-out. No times: the same verdict gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from slope_compile.verify.ci.verified import Verified, plain

CLASS = "slope_compile.verify"


def junit(verified: Verified) -> bytes:
    """Return the verdict as JUnit XML."""
    root = ElementTree.Element("testsuites", name="slope-compile verify")
    for target in verified.targets:
        suite = ElementTree.SubElement(root, "testsuite", name=_suite(target))
        for check in verified.checks:
            if check.get("target") == target:
                _add_check(suite, check)
        for row in verified.required:
            if row.get("target") == target:
                _add_requirement(suite, row)
        _count(suite)
    _count(root)
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return bytes(text) + b"\n"


def _suite(target: str | None) -> str:
    return "slope-compile verify" if target is None else f"slope-compile verify ({plain(target)})"


def _add_check(suite: ElementTree.Element, check: Mapping[str, Any]) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=CLASS, name=plain(check["name"]))
    if check["status"] == "fail":
        ElementTree.SubElement(case, "failure", message=check["detail"], type="check")
    elif check["status"] == "not checked":
        ElementTree.SubElement(case, "skipped", message=check["detail"])
    figures = json.dumps(check["figures"], indent=1, allow_nan=False)  # ASCII: JSON escapes what XML cannot hold
    ElementTree.SubElement(case, "system-out").text = f"{check['detail']}\n{figures}"


def _add_requirement(suite: ElementTree.Element, row: Mapping[str, Any]) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"{CLASS}.require", name=f"require {row['name']}")
    if not row["met"]:
        ElementTree.SubElement(case, "failure", message=f"{row['status']}: {row['detail']}", type="requirement")


def _count(element: ElementTree.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    element.set("failures", str(len(list(element.iter("failure")))))
    element.set("errors", "0")
    element.set("skipped", str(len(list(element.iter("skipped")))))
