"""The files of the benchmark are what it says: each obeys the laws, and read whole has as many weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks.invariants import LAYOUTS, Layout, laws, whole, written


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda one: f"{one.dtype}-{one.op}-{one.layers}-{one.external}")
def test_layouts(layout: Layout, tmp_path: Path) -> None:
    small = layout._replace(layers=min(layout.layers, 2))
    path = written(small, 40_000, tmp_path)
    onnx.checker.check_model(path)
    counted = whole(path)
    assert " 0 of " in counted
    weights = int(counted.split()[0])
    assert 40_000 <= weights < 50_000
    said = laws(path)
    assert f"'elements': {weights}" in said if layout.dtype == "FLOAT16" else f"{weights} codes" in said


def test_a_broken_layout_is_no_figure(tmp_path: Path) -> None:
    path = written(LAYOUTS[0]._replace(layers=1), 40_000, tmp_path)
    data = np.fromfile(tmp_path / "weights.data", np.uint8)
    data[:] = 0x11
    data.tofile(tmp_path / "weights.data")
    with pytest.raises(AssertionError):
        laws(path)
