from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import slope_compile
from slope_compile.artifacts import RunFolder
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.pipeline import ROOMS, SHARED_ROOMS, Pipeline
from slope_compile.recipe import recipe_from

RECIPE = recipe_from({"model": {"name": "torchvision/resnet18"}, "data": {"source": "digits"}}, "test")


class ReachedError(Exception):
    """Training was about to start."""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A run folder with the state of an interrupted training; training itself only says that it was reached."""

    def reached(self: Pipeline, partial: Path, target: str) -> None:
        raise ReachedError

    monkeypatch.setattr(Pipeline, "_train", reached)
    made = Pipeline(RECIPE, RunFolder(tmp_path), Events())
    (tmp_path / "train.state").mkdir()
    (tmp_path / "train.state" / "key.json").write_text(json.dumps(made._key("train")))
    (tmp_path / "train.state" / "state.json").write_text("kept")
    return made


def test_the_state_of_the_same_training_is_kept(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ReachedError):
        pipeline.run(["train"])
    assert (tmp_path / "train.state" / "state.json").read_text() == "kept"


@pytest.mark.parametrize("contents", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_spoilt_note_is_an_error_that_names_it(pipeline: Pipeline, tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "train.state" / "key.json").write_bytes(contents)
    with pytest.raises(ArtifactError, match=r"key\.json is not a file of ours.*Delete .*train\.state"):
        pipeline.run(["train"])
    assert (tmp_path / "train.state" / "state.json").read_text() == "kept"


@pytest.mark.parametrize(("contents", "force"), [({"recipe": "another"}, False), ([], False), ("{", True)])
def test_the_state_of_another_training_is_dropped(
    pipeline: Pipeline, tmp_path: Path, contents: Any, force: bool
) -> None:
    text = contents if force else json.dumps(contents)
    (tmp_path / "train.state" / "key.json").write_text(text)
    pipeline.force = force
    with pytest.raises(ReachedError):
        pipeline.run(["train"])
    assert not (tmp_path / "train.state" / "state.json").exists()
    assert json.loads((tmp_path / "train.state" / "key.json").read_text()) == pipeline._key("train")


def test_the_last_build_is_at_hand_for_the_next(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its timing cache is used again; a new build is written beside it until it is done."""
    handed: list[Any] = []
    monkeypatch.setattr("slope_compile.build.engine.build_run", lambda *arguments: handed.append(arguments))
    pipeline._build(tmp_path / "partial", "a100")
    ((section, target, export, out, _, last),) = handed
    assert (section, target, export) == (RECIPE.build, "a100", tmp_path / "export")
    assert (out, last) == (tmp_path / "partial", tmp_path / "build" / "a100")


@pytest.mark.parametrize("kind", ROOMS)
def test_a_stage_depends_on_all_the_code_that_it_imports(kind: str) -> None:
    package = Path(slope_compile.__file__).parent
    rooms = {*SHARED_ROOMS, *ROOMS[kind]}
    imported = set()
    for room in rooms:
        files = (package / room).rglob("*.py") if (package / room).is_dir() else [package / room]
        for file in files:
            imported |= set(re.findall(r"^\s*from slope_compile\.(\w+)", file.read_text(), re.MULTILINE))
    assert {room for room in imported if (package / room).is_dir()} <= rooms
