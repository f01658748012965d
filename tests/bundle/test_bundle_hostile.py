"""Bundles whose checksums hold and whose values are evil: each is refused, none is a traceback."""

from __future__ import annotations

import json
import random
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bundle_files import changed, rewritten

from slope_compile.build.counts import summarize
from slope_compile.build.rows import engine_rows
from slope_compile.bundle.build import proved_plan, require_here
from slope_compile.bundle.contents import INDEX
from slope_compile.bundle.listed import read_layers
from slope_compile.bundle.opened import open_bundle
from slope_compile.bundle.verify import bundle_tolerance
from slope_compile.errors import CheckFailedError, SlopeCompileError
from slope_compile.qdq.tensors import load_model
from slope_compile.targets.options import Options

EVIL: tuple[Any, ...] = (
    None, True, 0, -1, 3, 2**31, 2**63, 10**4000, 0.5, 1e308, -1e308, float("nan"), float("inf"), "", "x", "9" * 5000,
    "1e9999", "10.3", "../../etc/passwd", "\0", "\ud800", "\u0663", "tensorrt", "orin", "FLOAT", "INT4", "sparse-fp16",
    "int8", "4:2", "sparse>=99", [], [[]], {}, {"x": 1}, {"\ud800": "\ud800"}, [None] * 50,
)  # fmt: skip
ROWS = {
    "layers": [
        {"name": "c.weight", "op": "Conv", "placement": "int4-storage", "reason": "asked", "container": "INT4",
         "bits": 4, "pattern": "2:4", "shape": [128, 4, 3, 3],
         "bytes": {"fp32": 1, "file": 1}, "density": 0.5, "more": [1]}
    ]
}  # fmt: skip


def mutated(value: Any, chance: random.Random) -> Any:
    """The same JSON with one value, somewhere in it, replaced, left out or added."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy: Any = value.copy()
        how = chance.random()
        if how < 0.06:
            del copy[key]
        elif how < 0.12 and isinstance(copy, dict):
            copy[chance.choice(["x", "name", "build", "\ud800"])] = chance.choice(EVIL)
        elif how < 0.12:
            copy.append(copy[key])
        else:
            copy[key] = mutated(copy[key], chance)
        return copy
    return chance.choice(EVIL)


def use(archive: Path, out: Path) -> None:
    """All that `build` does with a bundle but the building."""
    with open_bundle(archive, out, require_here) as bundle:
        contents = bundle.contents
        planned, layers = proved_plan(bundle), read_layers(bundle.files / "layers.json")
        backend = planned.situation.backend
        rows = engine_rows(planned.weights, planned.places, load_model(planned.placed).graph, "", backend, layers)
        json.dumps([rows, summarize(rows, "", backend), Options.of(contents.build).as_dict(), planned.profile])
        bundle_tolerance(contents)


@pytest.mark.parametrize("name", [INDEX, "placement.json", "layers.json"])
def test_no_value_of_a_bundle_ends_in_a_traceback(archive: Path, tmp_path: Path, name: str) -> None:
    chance, ends = random.Random(0), Counter[str]()
    base = tmp_path / "base.zip"
    base.write_bytes(archive.read_bytes())
    changed(base, "layers.json", json.dumps(ROWS).encode())
    with zipfile.ZipFile(base) as opened:
        told = json.loads(opened.read(name))
    use(base, tmp_path / "unchanged")
    for number in range(60):
        data = json.dumps(mutated(told, chance)).encode()
        bad = tmp_path / "evil.bundle.zip"
        if name == INDEX:
            rewritten(base, bad, {INDEX: data})
        else:
            bad.write_bytes(base.read_bytes())
            changed(bad, name, data)
        try:
            use(bad, tmp_path / f"out{number}")
            ends["taken"] += 1
        except (SlopeCompileError, CheckFailedError) as error:
            ends[type(error).__name__] += 1
    assert ends["ArtifactError"] > 15, ends
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("header", ['{"c.weight": {"bits": Infinity, "axis": 0, "pattern": null}}', "[" * 100_000])
def test_an_evil_header_of_codes_is_refused(archive: Path, tmp_path: Path, header: str) -> None:
    from safetensors.numpy import load, save

    bad = tmp_path / "evil.bundle.zip"
    bad.write_bytes(archive.read_bytes())
    with zipfile.ZipFile(bad) as opened:
        tensors = load(opened.read("codes.safetensors"))
    changed(bad, "codes.safetensors", save(tensors, {"coded_tensors": header}))
    with pytest.raises(SlopeCompileError, match=r"codes\.safetensors"):
        use(bad, tmp_path / "out")
