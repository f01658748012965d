"""An engine from a lone ONNX file: what is written beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import slope_compile as sc
import slope_compile.placement.save as save_module
from slope_compile.errors import StorageError
from slope_compile.qdq.reader import coded_weights


@pytest.mark.parametrize("inline", [True, False])
def test_the_placed_model_beside_the_engine_is_whole(net, tmp_path: Path, monkeypatch, inline: bool) -> None:  # type: ignore[no-untyped-def]
    if not inline:
        monkeypatch.setattr(save_module, "INLINE_BYTES", 0)
    model = net()
    sc.build(model, "a100", tmp_path / "e.engine", backend="tensorrt-rtx", precision="fp32")
    names = {"e.engine", "e.engine.placed.onnx", "e.engine.layers.json", "e.engine.log"}
    assert {path.name for path in tmp_path.iterdir()} == names | (set() if inline else {"e.engine.placed.data"})
    for old, new in zip(coded_weights(model), coded_weights(tmp_path / "e.engine.placed.onnx"), strict=True):
        assert old.name == new.name and np.array_equal(old.values(), new.values())


def test_a_folder_that_is_not_there_is_named(net, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StorageError, match=r"There is no folder .*nowhere to write e\.engine into"):
        sc.build(net(), "a100", tmp_path / "nowhere" / "e.engine")
    assert not list(tmp_path.iterdir())
