"""What `bench` measured, kept in the run: a later release is compared with it (`verify --baseline`).

bench/TARGET/bench.json     digested in the manifest; speaks of the engine whose sha256 it names
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slope_compile import machine
from slope_compile.artifacts import FileDigest, RunFolder, storage_errors

NAME = "bench.json"


def stage_of(target: str) -> str:
    """Return the stage that keeps an engine's speed."""
    return f"bench/{target}"


def keep(engine: Path, found: Mapping[str, Any]) -> Path | None:
    """Keep a measurement where its engine lies in a run or a bundle's folder; return the file.

    None where nothing was measured, or where the engine belongs to no run.

    Args:
        engine: The engine file.
        found: What `bench` returned.

    Raises:
        StorageError: If the file system refuses, or another process works there.
    """
    stage = engine.resolve().parent
    run = stage.parent.parent
    if found["status"] != "measured" or stage.parent.name != "build" or not (run / "manifest.json").is_file():
        return None
    folder, name = RunFolder.existing(run), stage_of(stage.name)
    started = time.monotonic()
    with folder.locked():
        digest = FileDigest.of(engine).sha256
        partial = folder.fresh_partial(name)
        with storage_errors(partial):
            told = {**found, "engine_file": f"build/{stage.name}/{engine.name}", "engine_sha256": digest}
            (partial / NAME).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        folder.commit(name, {"engine": digest}, machine.facts(started))
    return folder.stage_path(name) / NAME
