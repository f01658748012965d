"""What `bench` measured lies in the run, digested; elsewhere, and where nothing was measured, nothing is kept."""

from __future__ import annotations

import json
from pathlib import Path

from slope_compile.artifacts import FileDigest, RunFolder
from slope_compile.bench.keep import keep

FOUND = {"status": "measured", "engine_file": "/anywhere/model.engine", "engine": {"latency_ms": {"p50": 1.5}}}


def test_it_is_a_stage_of_the_engine_s_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    (folder.fresh_partial("build/orin") / "model.engine").write_bytes(b"plan")
    folder.commit("build/orin", {}, {})
    (folder.path / ".slope-compile.lock").touch()
    engine = folder.path / "build/orin/model.engine"
    kept = keep(engine, FOUND)
    assert kept == folder.path / "bench/orin/bench.json"
    told = json.loads(kept.read_text())
    assert told["engine_sha256"] == FileDigest.of(engine).sha256
    assert told["engine_file"] == "build/orin/model.engine"
    again = RunFolder.existing(folder.path)
    assert list(again.require("bench/orin").outputs) == ["bench/orin/bench.json"]
    assert again.records["build/orin"].outputs.keys() == {"build/orin/model.engine"}


def test_elsewhere_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(b"plan")
    assert keep(tmp_path / "m.engine", FOUND) is None
    folder = RunFolder(tmp_path / "run")
    (folder.fresh_partial("build/orin") / "model.engine").write_bytes(b"plan")
    folder.commit("build/orin", {}, {})
    assert keep(folder.path / "build/orin/model.engine", {"status": "not checked", "reason": "no GPU"}) is None
    assert not (folder.path / "bench").exists()
