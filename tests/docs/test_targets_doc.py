"""docs/targets.md says what the data file, the backends' table and the bindings say."""

from __future__ import annotations

from pathlib import Path

from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.target import TARGETS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    table = TEXT.split(f"{heading}\n", 1)[1].split("\n|---", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[1:]]


def test_the_table_of_targets() -> None:
    shown = {row[0].strip("| `"): row[1:] for row in rows("# Targets")}
    assert list(shown) == list(TARGETS)
    for name, target in TARGETS.items():
        sm, devices, versions, rtx, dla, batch = shown[name]
        assert (sm, devices, batch) == (".".join(map(str, target.sm)), target.devices, str(target.opt_batch))
        assert (rtx, dla) == (target.rtx if target.rtx != "no" else "–", str(target.dla_cores or "–"))
        for row in target.tensorrt:
            assert f"{row.first} to below {row.below}" in versions
            assert row.system in versions or not target.on_device


def test_the_published_figures() -> None:
    shown = {row[0].strip("| `"): row[1:] for row in rows("## Published figures")}
    for name, target in TARGETS.items():
        figures = (target.memory_gib, target.bandwidth_gbs, *(target.tflops[key] for key in ("fp32", "fp16", "int8")))
        assert shown[name] == [target.figures_of, *(f"{figure:g}" for figure in figures), f"×{target.sparse_speedup:g}"]


def test_what_tensorrt_rtx_refuses_is_told() -> None:
    told = TEXT.split("## What is refused, and why", 1)[1].split("\n## ", 1)[0]
    rtx = BACKENDS["tensorrt-rtx"]
    assert all(f"`{key}`" in told for key in rtx.refused)
    without = [f"`{name}`" for name, target in TARGETS.items() if target.sm not in rtx.ahead_of_time]
    assert ", ".join(without) in told


def test_every_wheel_that_is_held_is_named() -> None:
    paragraph = TEXT.split("`tests/targets/data/` has", 1)[1].split("`tests/targets/bindings.py`", 1)[0]
    for path in (ROOT / "tests" / "targets" / "data").glob("bindings-*.json"):
        assert ".".join(path.stem.rpartition("-")[2].split(".")[:3]) in paragraph
