"""`slope-compile doctor`: the health check of the images, and what a bug report starts with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slope_compile.targets.target import TARGETS

pytestmark = pytest.mark.e2e


def test_a_healthy_machine(cli: Any, tmp_path: Path) -> None:
    done = cli("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["healthy"] and told["problems"] == []
    assert set(told["targets"]) == set(TARGETS)
    assert told["targets"]["a100"]["built_by"] == ["tensorrt-rtx"]
    assert "slope-compile bundle RUN --target orin" in told["targets"]["orin"]["refusals"]["tensorrt-rtx"]
    assert told["folder"] == {"path": str(tmp_path), "free_bytes": told["folder"]["free_bytes"], "writable": True}
    assert "tensorrt" in {row["package"] for row in told["missing"]}
    assert f"a100 │ tensorrt-rtx {told['versions']['tensorrt-rtx']}" in " ".join(done.stderr.split())
    assert "healthy: yes" in done.stderr


def test_something_broken_exits_2_and_tells_everything_all_the_same(
    cold_cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: no such file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"), prepend=":")
    done = cold_cli("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 2
    told = json.loads(done.stdout)  # one object, and no usage error
    assert not told["healthy"]
    assert told["problems"][0]["problem"].endswith("does not import: ImportError: libnvinfer.so.10: no such file.")
    assert told["targets"]["a100"]["built_by"] == ["tensorrt-rtx"]
    assert "broken: tensorrt is installed" in done.stderr and "Traceback" not in done.stderr
