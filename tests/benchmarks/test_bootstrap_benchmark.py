from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.bootstrap import POPULATION, choose, main, population
from slope_compile.verify.metric.average_precision import mean_average_precision, plain


def test_a_validation_set_of_the_population_counts_an_image_as_often_as_it_was_drawn() -> None:
    reference, tested = population(0.05)
    assert plain(reference, "box") > plain(tested, "box") > 0.1
    rng = np.random.default_rng(0)
    images = np.sort(rng.integers(0, POPULATION, 300))
    chosen = choose(reference, images)
    weights = np.bincount(images, minlength=POPULATION)[None]
    assert chosen.items == 300
    expected = mean_average_precision(reference, "box", weights)[0]
    assert plain(chosen, "box") == pytest.approx(expected, abs=1e-12)


def test_the_benchmark_writes_every_row(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    main(["--sets", "3", "--detector-sets", "1", "--items", "50", "--images", "20", "--out", str(out)])
    found = json.loads(out.read_text())
    assert len(found["accuracy"]) == 4 and len(found["drop"]) == 24 and len(found["map_drop"]) == 3
    for row in (*found["accuracy"], *found["drop"], *found["map_drop"]):
        assert 0 <= row["coverage"] <= 1 and 0 <= row["plain"] <= 1 and row["width"] > 0
    assert found["command"].startswith("python -m benchmarks.bootstrap --sets 3") and "numpy" in found["versions"]
