"""`verify` of runs, through the command line in this process: what is required, compared, refused and reported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared_runs import ENGINE, engine_row, flip_code, make_run, recipe_of
from slope_compile_cli.console import Console
from slope_compile_cli.explained import tell_verdict
from verify_command import Run, in_process

from slope_compile.artifacts import RunFolder
from slope_compile.errors import SlopeCompileError
from slope_compile.verify.verdict import Check, Verdict


@pytest.fixture
def verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    return in_process(monkeypatch, capsys, tmp_path)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the artifacts are another test's: here they are these two."""
    verdict = Verdict((Check("digest", "pass", "all files"), Check("metric", "not checked", "no data")))
    monkeypatch.setattr("slope_compile.verify.run.verify_model", lambda *_, **__: verdict)


@pytest.fixture
def run(prepared: Path, tmp_path: Path) -> Path:
    """A finished run in ./run, to damage."""
    shutil.copytree(prepared, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_passes_and_tells_what_it_could_not_check(verify: Run, run: Path) -> None:
    done = verify("run", "--json")
    assert done.code == 0, done.err
    status = done.status()
    assert status["digest"] == status["codes"] == status["parity.onnx-default"] == "pass"
    assert status["parity.engine"] == status["metric"] == "not checked"
    assert done.json["required"] == []
    assert "verdict: pass" in done.err
    assert not (run / "ci").exists()


def test_what_is_required_must_pass(verify: Run, run: Path) -> None:
    done = verify("run", "--require", "codes", "--require", "metric", "--json")
    assert done.code == 1
    assert done.json["verdict"] == "fail"
    codes, metric = done.json["required"]
    assert (codes["name"], codes["met"]) == ("codes", True)
    assert (metric["name"], metric["status"], metric["met"], metric["target"]) == (
        "metric",
        "not checked",
        False,
        "a100",
    )
    assert "required: metric (a100) is not checked: " in done.err
    assert "verdict: fail (metric (a100) required)" in done.err
    kept = json.loads((run / "verify/a100/verify.json").read_text())
    assert (kept["verdict"], [row["met"] for row in kept["required"]]) == ("fail", [True, False])


def test_a_family_and_an_absent_check(verify: Run, run: Path) -> None:
    done = verify("run", "--require", "parity.*", "--require", "baseline.size", "--json")
    assert done.code == 1
    status = {row["name"]: row["status"] for row in done.json["required"]}
    assert status["parity.engine"] == "not checked"
    assert status["parity.placed"] == "pass"
    assert status["baseline.size"] == "absent"


def test_a_misspelt_requirement_is_refused_before_anything_runs(
    verify: Run, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slope_compile.verify.run.verify_model", lambda *_, **__: pytest.fail("it ran"))
    done = verify("run", "--require", "metrik")
    assert done.code == 2
    assert "The requirement 'metrik' names no check. Did you mean 'metric'?" in done.err
    assert not (run / "verify").exists()
    assert verify("run", "--set", "verify.require=[parity.onx]").code == 2
    assert verify("run", "--require", "metrik", "--dry-run").code == 2


@pytest.mark.usefixtures("settled")
def test_the_recipe_requires_too(verify: Run, run: Path) -> None:
    done = verify("run", "--set", "verify.require=[metric]", "--require", "digest", "--json")
    assert done.code == 1
    assert [row["name"] for row in done.json["required"]] == ["metric", "digest"]


def test_a_failed_check_is_told_and_exits_1(verify: Run, run: Path) -> None:
    flip_code(run / "export/model.onnx")
    done = verify("run")
    assert done.code == 1
    assert "verdict: fail (digest (a100), codes (a100)" in done.out


def test_a_divergence_is_told_with_both_tensors_and_the_replay(capsys: pytest.CaptureFixture[str]) -> None:
    side = {"shape": [1, 4], "min": -1.0, "max": 2.0}
    found = {
        "layer": "layer1.0.conv1", "operator": "Conv", "cause": "scale off by a power of two", "reference": side,
        "tested": {**side, "max": 4.0}, "reproducer": "reproducer/parity.onnx", "command": "polygraphy run model.onnx",
    }  # fmt: skip
    check = {"name": "parity.onnx", "status": "fail", "detail": "off", "figures": {"diverges": found}, "target": "a100"}
    tell_verdict(Console(), {"verdict": "fail", "checks": [check], "required": []}, lambda t: Path("runs/r") / str(t))
    out = capsys.readouterr().out
    assert (
        "parity.onnx (a100): first differs at layer1.0.conv1 (Conv); likely cause: scale off by a power of two" in out
    )
    assert "replay it: cd runs/r/a100/reproducer/parity.onnx && polygraphy run model.onnx" in out
    assert out.rstrip().endswith("verdict: fail (parity.onnx (a100))")
    assert [cell in out for cell in ("reference", "found", "2.0", "4.0")] == [True] * 4


def test_the_engine_of_a_run_is_refused_if_it_changed(verify: Run, run: Path) -> None:
    (run / ENGINE).write_bytes(b"somebody else's")
    done = verify("run", "--json")
    assert done.code == 1
    engine = next(check for check in done.json["checks"] if check["name"] == "parity.engine")
    assert (engine["status"], engine["figures"]["refused"]) == ("fail", True)
    assert "--trust-engine" in engine["detail"]
    assert done.status()["digest"] == "fail"
    trusted = verify("run", "--trust-engine", "--json")  # looked at: this machine has no GPU
    assert trusted.code == 1
    assert (trusted.status()["digest"], trusted.status()["parity.engine"]) == ("fail", "not checked")


def test_an_engine_that_the_manifest_does_not_list_is_refused(verify: Run, run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["build/a100"]["outputs"][ENGINE]
    (run / "manifest.json").write_text(json.dumps(manifest))
    done = verify("run", "--json")
    assert (done.code, done.status()["parity.engine"]) == (1, "fail")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--golden", "x.safetensors"], "run is a run folder; --golden goes with an .onnx file."),
        (["run", "--engine", "x.engine"], "--engine goes with an .onnx file"),
        (["run", "--out", "elsewhere"], "--out is where --ci writes"),
        (["run", "--ci", "--dry-run"], "--dry-run writes nothing"),
        (["run", "--baseline", "nowhere"], "nowhere does not exist"),
        (["m.onnx", "--target", "a100"], "m.onnx is an .onnx file; --target goes with a run folder or a bundle."),
        (["m.onnx", "--baseline", "run"], "--baseline goes with a run folder"),
        (["m.onnx", "--set", "verify.metric_drop=1"], "--set goes with a run folder"),
        (["m.onnx", "--dry-run"], "--dry-run goes with a run folder"),
        (["m.onnx", "--trust-engine"], "Name it with --engine."),
        (["m.onnx"], "m.onnx does not exist"),
        (["m.onnx", "--require", "metrik"], "Did you mean 'metric'?"),
        (["runn"], "runn does not exist"),
        (["run", "--target", "a1000"], "a1000"),
        (["run", "--target", "orin"], "has no finished 'build/orin'"),
        (["run", "--requires", "metric"], "--require"),
        (["b.zip", "--baseline", "run"], "b.zip is a bundle; --baseline goes with a run folder."),
    ],
)
def test_what_does_not_fit_is_refused(verify: Run, run: Path, arguments: list[str], said: str) -> None:
    done = verify(*arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not (run / "verify").exists()
    assert not (run / "ci").exists()


def test_dry_run_writes_nothing(verify: Run, run: Path) -> None:
    done = verify("run", "--dry-run", "--json")
    assert (done.code, done.json["outcomes"][0]["action"]) == (0, "would run")
    assert not (run / "verify").exists()


@pytest.mark.usefixtures("settled")
def test_a_later_run_does_not_take_a_verdict_with_a_baseline_for_its_own(verify: Run, run: Path) -> None:
    shutil.copytree(run, "release")
    assert verify("run", "--baseline", "release").code == 0
    key = RunFolder(run).records["verify/a100"].key
    assert len(key["baseline"]) == 64
    assert "engine" not in key
    assert verify("run").code == 0
    assert "baseline" not in RunFolder(run).records["verify/a100"].key


@pytest.fixture
def other(net: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def make(**given: Any) -> Path:
        return make_run(tmp_path / "other", net, **given).path

    return make


@pytest.mark.parametrize("path", ["run", "run/../run", "link"])
def test_a_run_is_no_baseline_of_its_own(verify: Run, run: Path, path: str) -> None:
    Path("link").symlink_to("run")
    done = verify("run", "--baseline", path)
    assert (done.code, f"--baseline {path} is the run that is verified" in done.err) == (2, True)
    assert not (run / "verify").exists()


def test_a_baseline_with_the_same_model_passes_and_says_so(verify: Run, run: Path) -> None:
    shutil.copytree(run, "release")
    done = verify("run", "--baseline", "release", "--json")
    assert done.code == 0, done.err
    said = {check["name"] for check in done.json["checks"] if check["detail"].endswith("byte for byte: the same model")}
    assert said == {"baseline.size", "baseline.metric"}
    status = {name: state for name, state in done.status().items() if name.startswith("baseline.")}
    assert status == {
        "baseline.size": "pass", "baseline.metric": "pass", "baseline.latency": "not checked",
        "baseline.sparse": "not checked", "baseline.layers": "pass",
    }  # fmt: skip


@pytest.mark.usefixtures("settled")
def test_worse_than_the_baseline_fails_and_a_budget_allows_it(
    verify: Run, net: Callable[..., Path], other: Any, tmp_path: Path
) -> None:
    make_run(tmp_path / "run", net)
    path = other(engine=b"pla", accuracy=0.9)
    done = verify("run", "--baseline", str(path), "--json")
    assert done.code == 1
    assert done.status()["baseline.size"] == done.status()["baseline.metric"] == "fail"
    detail = next(check["detail"] for check in done.json["checks"] if check["name"] == "baseline.size")
    assert "model.engine has 4 bytes, the baseline's 3 (+33.33 %); allowed +2 %" in detail
    allowed = verify(
        "run", "--baseline", str(path), "--set", "verify.baseline.size=0.5", "--set", "verify.baseline.metric_drop=0.2"
    )
    assert allowed.code == 0, allowed.out


def test_a_baseline_of_another_model_or_other_data_is_refused(verify: Run, run: Path, other: Any) -> None:
    path = other(recipe=recipe_of(data={"source": "digits"}))
    done = verify("run", "--baseline", str(path))
    assert done.code == 2
    assert "data.source is 'digits' there and 'imagefolder:nowhere' here" in done.err


@pytest.mark.parametrize("name", ["train/metrics.json", "export/model.onnx", ENGINE])
def test_a_damaged_baseline_is_refused(verify: Run, run: Path, other: Any, name: str) -> None:
    path = other()
    (path / name).write_bytes(b"x")
    done = verify("run", "--baseline", str(path))
    assert (done.code, name in done.err) == (2, True)
    assert not (run / "verify").exists()


@pytest.mark.usefixtures("settled")
def test_a_baseline_without_an_engine_is_not_compared_with_in_that(verify: Run, run: Path, other: Any) -> None:
    done = verify("run", "--baseline", str(other(engine=None)), "--json")
    assert done.code == 0, done.err
    checks = {check["name"]: check for check in done.json["checks"]}
    assert checks["baseline.sparse"]["status"] == checks["baseline.layers"]["status"] == "not checked"
    assert checks["baseline.sparse"]["detail"] == "the baseline has no finished 'build/a100'"
    assert list(checks["baseline.size"]["figures"]) == ["baseline", "budget", "model.onnx"]


@pytest.mark.usefixtures("settled")
def test_a_layer_that_lost_its_sparse_kernel_is_named(
    verify: Run, net: Callable[..., Path], other: Any, tmp_path: Path
) -> None:
    rows = [engine_row("c.weight", engine={"sparse_chosen": False}), engine_row("f.weight")]
    make_run(tmp_path / "run", net, built={"layers": rows})
    path = other()
    done = verify("run", "--baseline", str(path), "--json")
    assert done.code == 1
    sparse = next(check for check in done.json["checks"] if check["name"] == "baseline.sparse")
    assert (sparse["status"], sparse["figures"]["lost"]) == ("fail", ["c.weight"])
    assert verify("run", "--baseline", str(path), "--set", "verify.baseline.sparse_layers=1").code == 0


def test_an_unfinished_baseline_says_which_stage_is_missing(verify: Run, run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["stages"]["export"]
    (tmp_path / "half").mkdir()
    shutil.copytree(run / "train", tmp_path / "half/train")
    (tmp_path / "half/manifest.json").write_text(json.dumps(manifest))
    done = verify("run", "--baseline", "half")
    assert (done.code, "half has no finished 'export'" in done.err) == (2, True)


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    verify: Run, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slope_compile.verify.run.verify_model", lambda *_, **__: pytest.fail("it ran"))
    Path("taken").write_text("a file")
    done = verify("run", "--ci", "--out", "taken")
    assert (done.code, "taken is a file, not a folder for reports" in done.err) == (2, True)
    done = verify("run", "--ci", "--out", "/proc/nowhere")
    assert (done.code, "Traceback" in done.err) == (2, False)


def test_where_verification_cannot_run_there_is_no_report(
    verify: Run, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert verify("run", "--ci").code == 0
    assert (run / "ci/junit.xml").is_file()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")

    def impossible(*_: object, **__: object) -> None:
        raise SlopeCompileError("The disk is full, 100%.", "Free some space.")

    monkeypatch.setattr("slope_compile.verify.run.verify_model", impossible)
    done = verify("run", "--ci")
    assert done.code == 2
    assert list((run / "ci").iterdir()) == []
    assert (
        "::error title=slope-compile verify%3A could not verify::The disk is full, 100%25. Free some space." in done.err
    )


def test_ci_on_github(verify: Run, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary"))
    (tmp_path / "summary").write_text("before\n")
    flip_code(run / "export/model.onnx")
    done = verify("run", "--ci", "--json", "--require", "metric")
    assert done.code == 1
    names = ["junit.xml", "verify.json", "verify.sarif", "summary.md"]
    assert [Path(path).name for path in done.json["reports"]] == names
    assert sorted(path.name for path in (run / "ci").iterdir()) == sorted(names)
    lines = [line for line in done.err.splitlines() if line.startswith("::")]
    assert lines[0].startswith(
        "::error file=run/manifest.json,title=slope-compile verify%3A digest failed (a100)::export/"
    )
    assert any("metric is required and is not checked (a100)::" in line for line in lines)
    assert lines[-1].startswith("::notice ")
    assert (tmp_path / "summary").read_text() == "before\n" + (run / "ci/summary.md").read_text()


@pytest.mark.usefixtures("settled")
def test_a_summary_that_cannot_be_written_is_told_and_changes_no_verdict(
    verify: Run, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "no/summary"))
    done = verify("run", "--ci")
    assert (done.code, "no summary for the step: " in done.out) == (0, True)
    assert (run / "ci/junit.xml").is_file()


@pytest.mark.usefixtures("settled")
def test_ci_on_gitlab(verify: Run, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITLAB_CI", "true")
    assert verify("run", "--ci", "--out", "reports").code == 0
    assert json.loads(Path("reports/gl-code-quality-report.json").read_text()) == []
    monkeypatch.delenv("GITLAB_CI")
    assert verify("run", "--ci", "--out", "reports").code == 0
    assert not Path("reports/gl-code-quality-report.json").exists()  # of the other system


def test_reports_are_the_same_bytes_for_the_same_verdict(verify: Run, run: Path) -> None:
    contents = []
    for _ in range(2):
        assert verify("run", "--ci").code == 0
        contents.append({path.name: path.read_bytes() for path in (run / "ci").iterdir()})
    assert contents[0] == contents[1]
