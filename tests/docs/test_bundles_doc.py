"""docs/bundles.md names every file, key and check of a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from slope_compile.bundle import archive, verify
from slope_compile.bundle.contents import INDEX, MAX_FILE_BYTES, NAMES, Contents
from slope_compile.verify.built import check as engine_layers

TEXT = (Path(__file__).parents[2] / "docs" / "bundles.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted({INDEX, *NAMES, *Contents.model_fields, engine_layers.NAME, verify.PLACEMENT}))
def test_it_names(name: str) -> None:
    assert f"`{name}`" in TEXT


def test_it_tells_the_limits() -> None:
    assert f"{MAX_FILE_BYTES >> 30} GiB a file, {archive.MAX_TOTAL_BYTES >> 30} GiB in all" in TEXT
    assert f"{archive.MIN_ALLOWANCE >> 20} MiB plus {archive.MAX_INFLATION} times" in TEXT
    assert f"{archive.MAX_DIRECTORY_BYTES >> 10} KiB at most" in TEXT
