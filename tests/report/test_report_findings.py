from __future__ import annotations

import json

from report_pages import check
from report_runs import FAILED, VERDICT, make_run

from slope_compile.report.findings import failures, unchecked
from slope_compile.report.page import RunData, render


def test_a_failure_shows_layer_cause_statistics_and_how_to_replay_it() -> None:
    page = render(make_run(verdicts={"a100": FAILED}))
    text = check(page).text()
    for words in ("What failed", "First layer that differs", "layer2.0.downsample.0", "(Conv)", "Likely cause"):
        assert words in text
    for words in ("0.98 of the largest value, allowed 8.5e−05", "the scale is off by a power of two", "not finite"):
        assert words in text
    for words in ("6.25", "12.5", "verify/a100/reproducer/parity.onnx"):
        assert words in text
    command = FAILED["checks"][3]["figures"]["diverges"]["command"]  # type: ignore[index]
    assert f"<code>{command}</code>" in page


def test_a_failure_without_a_layer_says_so_where_there_could_be_one() -> None:
    failed = json.loads(json.dumps(FAILED))
    del failed["checks"][3]["figures"]["diverges"]
    page = str(failures(make_run(verdicts={"a100": failed})))
    assert page.count("did not name a layer") == 1  # of parity.onnx, not of pattern
    failed["checks"][3]["figures"]["diverges"] = {"layer": None, "cause": None, "reference": [], "command": ""}
    page = str(failures(make_run(verdicts={"a100": failed})))
    assert "not named" in page and "not recognized" in page and "<pre" not in page and "<table" not in page


def test_the_story_of_the_layer_is_told_once() -> None:
    failed = json.loads(json.dumps(FAILED))
    failed["checks"][3]["detail"] = "differs by 0.4, allowed 1e-05; first differs at layer2 (Conv): off by 1"
    text = check(render(make_run(verdicts={"a100": failed}))).text()
    assert text.count("differs by 0.4, allowed 1e-05") == 3 and text.count("first differs at") == 1  # in the checks
    del failed["checks"][3]["figures"]["diverges"]
    assert check(render(make_run(verdicts={"a100": failed}))).text().count("first differs at") == 3


def test_without_failures_there_is_no_such_part() -> None:
    assert failures(make_run()) is None
    assert "What failed" not in check(render(make_run())).text()


def test_every_open_check_stands_with_its_reason() -> None:
    page = unchecked(make_run(verdicts={"a100": FAILED}))
    assert page.count("<tr>") == 1 + 4
    assert "the validation images are not here" in page and "None of these counts as a pass" in page


def test_the_same_reason_of_several_targets_stands_once() -> None:
    page = unchecked(make_run(verdicts={"a100": VERDICT, "rtx-4090": VERDICT}))
    assert page.count("there is no GPU here") == 1 and "a100, rtx-4090" in page


def test_what_the_build_could_not_read_is_open_too() -> None:
    run = make_run()
    builds = json.loads(json.dumps(run.builds))
    builds["a100"]["summary"] |= {
        "held": None,
        "sparse": {"eligible_by": "own count", "chosen_by": "not checked: TensorRT-RTX chooses kernels at run time"},
    }
    page = unchecked(make_run(builds=builds))
    assert "sparse kernels, chosen" in page and '<td class="wide">TensorRT-RTX chooses kernels at run time' in page
    assert "sparse kernels, eligible" not in page and "the engine could not be read" in page


def test_nothing_open_and_nothing_verified_are_two_things() -> None:
    done = {"verdict": "pass", "checks": VERDICT["checks"][:2]}
    assert "Everything was checked" in unchecked(make_run(verdicts={"a100": done}))
    assert "Nothing was checked" in unchecked(RunData("new", {}))
