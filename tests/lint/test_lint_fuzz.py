"""Damaged files give violations or an ArtifactError, never a traceback."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lint_cases import BROKEN, external
from lint_graphs import conv, int4, situation, skip

from slope_compile.errors import ArtifactError
from slope_compile.lint.check import lint
from slope_compile.lint.rules import Violation


@cache
def originals() -> list[bytes]:
    return [graph.SerializeToString() for graph in (conv(dtype="INT4"), int4((8, 4), 4), skip(True))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_bytes(tmp_path: Path, data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(originals())))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        if data.draw(st.booleans()):
            damaged[place] = data.draw(st.integers(0, 255))
        else:
            del damaged[place]
    path = tmp_path / "m.onnx"
    path.write_bytes(damaged)
    with contextlib.suppress(ArtifactError):
        assert all(isinstance(found, Violation) for found in lint(path, situation()))


@pytest.mark.parametrize("content", [b"", b"\x00", b"not an onnx file", b"\xff" * 100])
def test_no_model_at_all(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.onnx"):
        lint(tmp_path / "m.onnx", situation())


def test_every_node_without_its_inputs_or_attributes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for _, _, _, make, _ in BROKEN:
        for spoil in ("input", "attribute", "output"):
            graph = make()
            for node in graph.graph.node:
                node.ClearField(spoil)
            path.write_bytes(graph.SerializeToString())
            with contextlib.suppress(ArtifactError):
                lint(path, situation())


def test_a_location_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(external("gone.bin").SerializeToString().replace(b"gone.bin", b"gone\xff\xfe\xfd\xfc"))
    assert {v.rule for v in lint(path, situation())} == {"external-data", "malformed-weight"}
