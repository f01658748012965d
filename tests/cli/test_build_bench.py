"""`build --bench`: whatever keeps a finished engine from being measured, the build's answer and its gate stay."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from slope_compile_cli import build as build_module

from slope_compile.errors import ArtifactError, BackendError, CheckFailedError

ENGINE = {
    "layer": None, "layer_type": None, "dtype": None, "bytes": None, "computed_by": None, "tactic": None,
    "fused": None, "fused_with": [], "sparse_eligible": None, "sparse_chosen": None, "sparse_note": None,
    "int8_product": None, "held": False, "note": "nothing found",
}  # fmt: skip
ROW = {"name": "a.weight", "placement": "int4-weight", "reason": "r", "bits": 4, "fits_2_4": True, "engine": ENGINE}
SUMMARY = {
    "coded": 1, "held": None, "not_held": None, "not_found": ["a.weight"], "float": None, "read_from": "nowhere",
    "line": "the line",
}  # fmt: skip
BUILT: dict[str, Any] = {"header": {}, "summary": SUMMARY, "layers": [ROW]}


def no_bench(*_: Any) -> Any:
    raise BackendError("The process that measured the engine died.", "Build it again.")


@pytest.fixture(params=["file", "bundle", "run"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Something whose engine is built already, of which nothing can be measured."""
    monkeypatch.setattr("slope_compile.bench.run.bench", no_bench)
    monkeypatch.setattr("slope_compile.build.single.build", lambda *_, **__: BUILT)
    made = SimpleNamespace(engine=tmp_path / "model.engine", layers=BUILT, action="done", reason="r", require=())
    monkeypatch.setattr(build_module.bundle, "is_bundle", lambda source: source.suffix == ".zip")
    monkeypatch.setattr(build_module.bundle, "build", lambda *_: made)
    recipe = SimpleNamespace(build=SimpleNamespace(targets=["a100"], require=[]))
    monkeypatch.setattr(build_module.options, "recipe_of", lambda *_: recipe)
    monkeypatch.setattr(build_module.options, "execute", lambda *_, **__: [])
    monkeypatch.setattr(build_module.RunFolder, "existing", lambda path: path)
    monkeypatch.setattr(build_module, "build_of", lambda *_: BUILT)
    return tmp_path / {"file": "m.onnx", "bundle": "m.zip", "run": "run"}[request.param]


def test_the_answer_and_the_gate_stay(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        build_module.command(source, require=["float==0"], bench=True, json=True)
    assert ended.value.exit_code == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    bench = told["bench"].get("build/a100", told["bench"])
    reason = "The process that measured the engine died. Build it again."
    assert bench == {"status": "not checked", "reason": reason}
    assert f"speed not checked: {reason}" in err
    assert [(row["figure"], row["met"]) for row in told["requirements"]] == [("not checked", False)]
    assert "coded layers are held in the declared type: not checked: neither the engine inspector" in err


def test_without_json_the_gate_speaks_last(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckFailedError, match="float==0: layers left in float are not checked"):
        build_module.command(source, require=["float==0"], bench=True)
    assert "speed not checked: The process that measured the engine died" in capsys.readouterr().out


def test_without_a_gate_it_is_done(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise ArtifactError("Edited.", "Build it again.")

    monkeypatch.setattr("slope_compile.bench.run.bench", refused)
    build_module.command(source, bench=True)
