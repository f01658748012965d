"""The chain on a machine with an NVIDIA GPU: bf16 training, an engine built for that GPU, its outputs compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slope_compile.targets.gpu import find_gpu
from slope_compile.targets.target import TARGETS

GPU = find_gpu()
TARGET = next((target.name for target in TARGETS.values() if GPU and target.sm == GPU.sm), None)


@pytest.mark.gpu
@pytest.mark.e2e
@pytest.mark.skipif(TARGET is None, reason=f"needs an NVIDIA GPU that is one of our targets; here: {GPU or 'none'}")
def test_an_engine_for_this_gpu_agrees_with_the_trained_model(workplace: Path, tmp_path: Path, cold_cli: Any) -> None:
    for name in ("tiny.py", "tiny.yaml"):
        shutil.copy(workplace / name, tmp_path)
    done = cold_cli("run", "tiny.yaml", "--json", "--set", f"build.targets=[{TARGET}]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    status = {check["name"]: check["status"] for check in json.loads(done.stdout)["checks"]}
    assert status["parity.engine"] == "pass"
