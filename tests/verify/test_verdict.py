from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slope_compile.artifacts import FileDigest, Mismatch
from slope_compile.errors import ArtifactError, StorageError
from slope_compile.verify.ci.junit import junit
from slope_compile.verify.ci.verified import Verified
from slope_compile.verify.files import write_verdict
from slope_compile.verify.laws.digests import Digests, check_digests
from slope_compile.verify.verdict import Check, NotCheckedError, Once, Verdict, attempt, listed, reason, significant

STATUSES = ("pass", "fail", "not checked")
VERDICT = Verdict(
    (
        Check("pattern", "pass", "21 weights", {"tensors": 21}),
        Check(
            "codes", "fail", "conv1.weight: <1> & \x07\n more", {"relative": float("nan"), "failing": ("conv1.weight",)}
        ),
        Check("metric", "not checked", "no validation data was given"),
    )
)


@given(st.lists(st.sampled_from(STATUSES)))
def test_the_verdict_is_pass_exactly_if_some_check_passed_and_none_failed(statuses: list[str]) -> None:
    verdict = Verdict(tuple(Check("c", status, "") for status in statuses))  # type: ignore[arg-type]
    assert verdict.verdict == ("pass" if "pass" in statuses and "fail" not in statuses else "fail")


def test_what_is_required_must_pass() -> None:
    passed, unchecked = VERDICT.checks[0], VERDICT.checks[2]
    assert Verdict((passed,), ("pattern",)).verdict == "pass"
    for required in (("metric",), ("pattern", "metric"), ("parity.onnx",)):
        assert Verdict((passed, unchecked), required).verdict == "fail"
    assert Verdict((passed, unchecked)).verdict == "pass"
    (row,) = Verdict((passed,), ("metric",)).requirements()
    assert (row["status"], row["met"]) == ("absent", False)


def test_json_has_the_form_of_the_command() -> None:
    assert VERDICT.to_json() == {
        "verdict": "fail",
        "checks": [
            {"name": "pattern", "status": "pass", "detail": "21 weights", "figures": {"tensors": 21}},
            {
                "name": "codes",
                "status": "fail",
                "detail": "conv1.weight: <1> & \x07\n more",
                "figures": {"relative": "nan", "failing": ["conv1.weight"]},
            },
            {"name": "metric", "status": "not checked", "detail": "no validation data was given", "figures": {}},
        ],
        "required": [],
    }


def test_both_files_are_written_the_same_every_time(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        write_verdict(folder, VERDICT)
        assert sorted(path.name for path in folder.iterdir()) == ["junit.xml", "verify.json"]
        contents.append([(folder / file).read_bytes() for file in ("verify.json", "junit.xml")])
    assert contents[0] == contents[1]
    assert json.loads(contents[0][0]) == VERDICT.to_json()


def test_junit_counts_and_tells_what_the_checks_found() -> None:
    suites = ElementTree.fromstring(junit(Verified("onnx", "m.onnx", VERDICT.to_json())))
    (suite,) = suites
    assert {key: suite.get(key) for key in ("tests", "failures", "skipped", "errors")} == {
        "tests": "3", "failures": "1", "skipped": "1", "errors": "0",
    }  # fmt: skip
    passed, failed, skipped = suite.findall("testcase")
    assert [case.get("name") for case in suite] == ["pattern", "codes", "metric"]
    assert passed.find("failure") is None and passed.find("skipped") is None
    message = failed.find("failure")
    assert message is not None and "conv1.weight: <1> & \N{REPLACEMENT CHARACTER}" in str(message.get("message"))
    reason_given = skipped.find("skipped")
    assert reason_given is not None and reason_given.get("message") == "no validation data was given"
    assert all("time" not in element.attrib for element in suite.iter())


def test_a_folder_that_is_gone_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="gone"):
        write_verdict(tmp_path / "gone", VERDICT)


def test_what_a_check_raises_becomes_its_status_in_one_line() -> None:
    def damaged() -> Check:
        raise ArtifactError("conv1.weight is cut off.", "Export it again.")

    def unforeseen() -> Check:
        raise KeyError("x\n" * 400)

    def impossible() -> Check:
        raise NotCheckedError("no GPU")

    assert attempt("codes", damaged) == Check("codes", "fail", "conv1.weight is cut off.")
    assert attempt("metric", impossible) == Check("metric", "not checked", "no GPU")
    detail = attempt("codes", unforeseen).detail
    assert detail.startswith("KeyError") and "\n" not in detail and len(detail) <= 300


def test_an_interrupt_is_nobodys_finding() -> None:
    def interrupted() -> Check:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt("codes", interrupted)


def test_what_is_loaded_once_is_loaded_once_and_fails_for_everybody() -> None:
    calls = []

    def load() -> int:
        calls.append(1)
        return 7

    value = Once(load)
    assert value() == value() == 7
    assert len(calls) == 1

    def fail() -> int:
        calls.append(1)
        raise ValueError("cut off")

    broken = Once(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="cut off"):
            broken()
    assert len(calls) == 2


def test_many_problems_are_counted_beyond_the_first() -> None:
    assert listed(["a", "b"]) == "a; b"
    assert listed([str(i) for i in range(12)], most=2) == "0; 1; and 10 more"


@given(st.floats(1e-30, 1e30))
def test_rounding_keeps_three_significant_digits(value: float) -> None:
    assert abs(significant(value) - value) <= 0.5e-2 * value


def test_reasons_hold_no_control_characters() -> None:
    assert reason(ValueError("a\x1b[31mb\x00")) == "ValueError: a [31mb"


def test_digests() -> None:
    good = check_digests(Digests(4))
    assert (good.status, good.figures["files"]) == ("pass", 4)
    expected, found = FileDigest(3, "a" * 64), FileDigest(2, "b" * 64)
    bad = check_digests(
        Digests(4, [Mismatch("export/model.onnx", expected, found), Mismatch("train/x", expected, None)])
    )
    assert bad.status == "fail"
    assert "export/model.onnx" in bad.detail and "train/x is missing" in bad.detail
    assert bad.figures["mismatches"] == ["export/model.onnx", "train/x"]
    with pytest.raises(NotCheckedError):
        check_digests(None)


def test_figures_of_numpy_floats_are_json() -> None:
    figures = Check("c", "pass", "", {"a": np.float64(0.5), "b": np.float64("inf")}).to_json()["figures"]
    assert json.dumps(figures, allow_nan=False) == '{"a": 0.5, "b": "inf"}'
