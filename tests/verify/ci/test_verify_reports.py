"""The reports of `verify --ci`, each against the rules of its format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slope_compile.errors import StorageError
from slope_compile.verify.ci.annotations import workflow_command, workflow_commands
from slope_compile.verify.ci.junit import junit
from slope_compile.verify.ci.markdown import markdown
from slope_compile.verify.ci.quality import code_quality
from slope_compile.verify.ci.sarif import RULES, sarif
from slope_compile.verify.ci.verified import Verified, plain, repository_path
from slope_compile.verify.ci.write import NAMES, append_summary, prepare_reports, write_reports
from slope_compile.verify.require import CHECKS

SIDE = {"shape": [1, 4], "min": -1.0, "max": 2.0}
DIVERGES = {
    "layer": "layer1.0.conv1", "operator": "Conv", "cause": "scale ×2", "reference": SIDE,
    "tested": {**SIDE, "max": 4.0}, "reproducer": "reproducer/parity.onnx", "command": "polygraphy run model.onnx",
}  # fmt: skip
NASTY = "a|b <i>&\n::error::x % \x1b[31m \x00 `c` ]]> é \ud800"


def check(name: str, status: str, detail: str = "told", target: str | None = "a100", **figures: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "detail": detail, "figures": figures} | (
        {"target": target} if target else {}
    )


def verified(*checks: Mapping[str, Any], required: Any = (), verdict: str = "fail", kind: Any = "run") -> Verified:
    return Verified(kind, "runs/r", {"verdict": verdict, "checks": list(checks), "required": list(required)})


UNMET = {"name": "metric", "status": "not checked", "met": False, "detail": "no data", "target": "a100"}
FAILED = verified(
    check("digest", "pass"),
    check("codes", "fail", NASTY),
    check("parity.onnx", "fail", "off", diverges=DIVERGES),
    check("metric", "not checked", "no data"),
    check("digest", "pass", target="orin"),
    required=[UNMET, {**UNMET, "name": "digest", "status": "pass", "met": True}],
)
PASSED = verified(check("digest", "pass"), check("metric", "not checked", "no data"), verdict="pass")
NOTHING = verified(check("metric", "not checked", "no data"))

# Jenkins' junit-10.xsd: element -> attributes it must have, attributes it may have, children.
JUNIT: dict[str, tuple[set[str], set[str], set[str]]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "disabled", "errors", "skipped"}, {"testsuite"}),
    "testsuite": ({"name", "tests"}, {"failures", "errors", "skipped", "time", "timestamp", "id"}, {"testcase"}),
    "testcase": (
        {"name"},
        {"classname", "time", "status", "assertions"},
        {"skipped", "failure", "error", "system-out"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
    "system-out": (set(), set(), set()),
}


@pytest.mark.parametrize("report", [FAILED, PASSED, NOTHING])
def test_junit_is_of_its_schema(report: Verified) -> None:
    root = ElementTree.fromstring(junit(report))
    assert root.tag == "testsuites"
    for element in root.iter():
        must, may, children = JUNIT[element.tag]
        assert must <= set(element.attrib) <= must | may
        assert {child.tag for child in element} <= children
    for suite in (root, *root):
        cases = list(suite.iter("testcase"))
        assert int(suite.get("tests", "")) == len(cases)
        assert int(suite.get("failures", "")) == sum(case.find("failure") is not None for case in cases)
        assert int(suite.get("skipped", "")) == sum(case.find("skipped") is not None for case in cases)


def test_junit_has_a_suite_a_target_and_a_case_a_requirement() -> None:
    root = ElementTree.fromstring(junit(FAILED))
    assert [suite.get("name") for suite in root] == ["slope-compile verify (a100)", "slope-compile verify (orin)"]
    names = [case.get("name") for case in root[0]]
    assert names == ["digest", "codes", "parity.onnx", "metric", "require metric", "require digest"]
    skipped, required = root[0][3].find("skipped"), root[0][4].find("failure")
    assert skipped is not None and skipped.get("message") == "no data"
    assert required is not None and required.get("message") == "not checked: no data"
    assert root[0][5].find("failure") is None


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_any_text_is_well_formed_xml_and_utf_8(text: str) -> None:
    report = verified(
        check("codes", "fail", text, diverges={**DIVERGES, "layer": text, "cause": text, "command": text})
    )
    root = ElementTree.fromstring(junit(report))
    failure = next(root.iter("failure"))
    assert failure.get("message") == plain(text)
    json.loads(sarif(report))
    json.loads(code_quality(report))
    markdown(report).encode()
    lines = workflow_commands(report)
    assert len(lines) == 1 and len(lines[0].splitlines()) == 1


# SARIF 2.1.0, of each object that is used: what it must have, what it may have (the schema allows no other).
SARIF: dict[str, tuple[set[str], set[str]]] = {
    "log": ({"version", "runs"}, {"$schema", "inlineExternalProperties", "properties"}),
    "run": ({"tool"}, {"automationDetails", "invocations", "results", "artifacts", "columnKind", "properties"}),
    "driver": ({"name"}, {"version", "rules", "informationUri", "fullName"}),
    "rule": ({"id"}, {"shortDescription", "fullDescription", "defaultConfiguration", "helpUri", "name", "properties"}),
    "invocation": ({"executionSuccessful"}, {"toolExecutionNotifications", "exitCode"}),
    "notification": ({"message"}, {"level", "associatedRule", "descriptor", "locations"}),
    "result": (
        {"message"},
        {"ruleId", "ruleIndex", "kind", "level", "locations", "partialFingerprints", "fingerprints", "properties"},
    ),
}


def of_schema(name: str, value: Mapping[str, Any]) -> None:
    must, may = SARIF[name]
    assert must <= value.keys() <= must | may, name


@pytest.mark.parametrize("report", [FAILED, PASSED, NOTHING])
def test_sarif_is_of_its_schema(report: Verified) -> None:
    log = json.loads(sarif(report))
    of_schema("log", log)
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    of_schema("run", run)
    driver = run["tool"]["driver"]
    of_schema("driver", driver)
    for rule in driver["rules"]:
        of_schema("rule", rule)
        assert rule["shortDescription"]["text"]
    for note in run["invocations"][0]["toolExecutionNotifications"]:
        of_schema("notification", note)
        assert note["level"] == "note" and note["message"]["text"]
    of_schema("invocation", run["invocations"][0])
    for result in run["results"]:
        of_schema("result", result)
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert (result["kind"], result["level"]) == ("fail", "error")
        (location,) = result["locations"]
        assert not re.search(r"[\\ %](?![0-9A-F]{2})", location["physicalLocation"]["artifactLocation"]["uri"])
        assert location["physicalLocation"]["region"]["startLine"] >= 1
    assert len({str(result["partialFingerprints"]) for result in run["results"]}) == len(run["results"])


def test_sarif_tells_failures_as_results_and_what_was_not_checked_as_notes() -> None:
    (run,) = json.loads(sarif(FAILED))["runs"]
    assert [result["ruleId"] for result in run["results"]] == ["codes", "parity.onnx", "metric"]
    assert "required and is not checked" in run["results"][2]["message"]["text"]
    (note,) = run["invocations"][0]["toolExecutionNotifications"]
    assert note["message"]["text"] == "metric (a100) not checked: no data"
    assert json.loads(sarif(PASSED))["runs"][0]["results"] == []
    (result,) = json.loads(sarif(NOTHING))["runs"][0]["results"]
    assert result["ruleId"] == "verdict"


def test_every_check_has_a_rule() -> None:
    assert list(RULES) == [*CHECKS, "verdict"]


def test_code_quality_is_of_its_form() -> None:
    issues = json.loads(code_quality(FAILED))
    assert [issue["check_name"] for issue in issues] == [
        f"slope-compile/{n}" for n in ("codes", "parity.onnx", "metric")
    ]
    for issue in issues:
        assert issue.keys() == {"description", "check_name", "fingerprint", "severity", "location"}
        assert issue["severity"] in ("info", "minor", "major", "critical", "blocker")
        assert issue["location"] == {"path": "runs/r/export/model.onnx", "lines": {"begin": 1}}
    assert len({issue["fingerprint"] for issue in issues}) == len(issues)
    assert json.loads(code_quality(PASSED)) == []


def test_a_fingerprint_is_of_what_is_wrong_where_not_of_the_words() -> None:
    one, other = (json.loads(code_quality(verified(check("codes", "fail", text)))) for text in ("a", "b"))
    assert one[0]["fingerprint"] == other[0]["fingerprint"]


def test_a_command_inside_an_annotation_is_none() -> None:
    line = workflow_command("error", "##[a]", "x\n::stop-commands::zz\n##[group] ##[end]", "##[b]")
    assert "##[" not in line
    assert line.count("::") == 2  # the annotation's own
    assert line.endswith("x%0A: :stop-commands: :zz%0A# #[group] # #[end]")


def test_workflow_commands_are_escaped() -> None:
    line = workflow_command("error", "a: b, c", "50% of\r\nall ::x", "runs/a,b.onnx")
    assert line == "::error file=runs/a%2Cb.onnx,title=slope-compile verify%3A a%3A b%2C c::50%25 of%0Aall : :x"
    lines = workflow_commands(FAILED)
    assert [line.partition(" ")[0] for line in lines] == ["::error", "::error", "::error", "::notice"]
    assert lines[3].endswith("::metric (a100): no data")


def test_markdown_tells_why_where_and_all_checks() -> None:
    text = markdown(FAILED)
    assert "## slope-compile verify: fail" in text
    assert "- **parity.onnx failed (a100)**: off" in text
    assert "### parity.onnx: first differs at `layer1.0.conv1` (Conv)" in text
    assert "Likely cause: scale ×2" in text
    assert "| tested | \\[1, 4\\] | -1.0 | 4.0 |" in text
    assert "Replay it in `runs/r/verify/a100/reproducer/parity.onnx`: `polygraphy run model.onnx`" in text
    assert "<i>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| codes")]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0])) == 5
    assert "Why it fails" not in markdown(PASSED)


def test_a_bundle_and_a_file_are_the_place_themselves() -> None:
    for kind in ("bundle", "onnx"):
        (finding,) = verified(check("codes", "fail", target=None), kind=kind).findings()
        assert (finding.file, finding.title) == ("runs/r", "codes failed")


def test_paths_are_those_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert repository_path(Path("runs/r"), {}) == "runs/r"
    assert repository_path(Path("runs/r"), {"GITHUB_WORKSPACE": str(tmp_path)}) == "sub/runs/r"
    assert repository_path(Path("../r"), {"CI_PROJECT_DIR": str(tmp_path)}) == "r"
    assert repository_path(Path("/elsewhere/r"), {}) == "/elsewhere/r"
    outside = Verified("onnx", "/elsewhere/m 1.onnx", verified(check("codes", "fail")).verdict)
    (result,) = json.loads(sarif(outside))["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "file:///elsewhere/m%201.onnx"
    assert json.loads(code_quality(outside))[0]["location"]["path"] == "m 1.onnx"


def test_all_reports_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "deep/ci"
    prepare_reports(folder)
    assert write_reports(folder, FAILED, gitlab=True) == [folder / name for name in NAMES]
    (folder / "mine.txt").touch()
    prepare_reports(folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]

    def full(self: Path, data: bytes) -> int:
        if self.name == "verify.sarif":
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        write_reports(folder, FAILED, gitlab=False)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_summary_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        append_summary(tmp_path / "no/summary.md", PASSED)
