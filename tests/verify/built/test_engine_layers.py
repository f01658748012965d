"""`engine.layers` on a real engine's metadata: each thing that is said in it is changed, and must be seen."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from engine_files import write_layers
from onnx import numpy_helper

from slope_compile.build.engine import build_engine
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.placement.choose import Place
from slope_compile.recipe import BatchRange, BuildSection
from slope_compile.verify.built.check import check_engine_layers, held_layers
from slope_compile.verify.parity.engine import EngineUnderTest
from slope_compile.verify.verdict import Check, NotCheckedError

# No file tells them: what the recipe asked for, and the version of who built.
UNTOLD = {
    "header/version", "header/precision_reason", "header/options/workspace", "header/options/optimization_level",
    "header/options/version_compatible", "header/options/hardware_compatibility", "header/options/refit",
    "header/options/strip", "header/options/dla", "header/notes", "header/notes/0", "layers/0/reason",
    "layers/1/reason", "layers/2/reason", "header/profile/x/min/0", "header/profile/x/opt/0", "header/profile/x/max/0",
}  # fmt: skip


@dataclass(frozen=True)
class Built:
    """A build, and a copy of it to damage."""

    onnx: Path
    folder: Path

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "layers.json").read_text())
        return found

    def check(self, document: Any = None, **expected: Any) -> Check:
        if document is not None:
            (self.folder / "layers.json").write_text(json.dumps(document))
        engine = EngineUnderTest(self.folder / "model.engine", self.folder / "layers.json", trusted=False, sha256=None)
        return check_engine_layers(engine, self.onnx, self.folder / "placed.onnx", "a100", **expected)

    def failure(self, edit: Callable[[Any], Any]) -> str:
        document = self.document()
        edit(document)
        check = self.check(document)
        assert check.status == "fail", check
        return check.detail


@pytest.fixture(scope="module")
def made(net: Any, tmp_path_factory: pytest.TempPathFactory) -> Built:
    model, out = net(), tmp_path_factory.mktemp("built")
    section = BuildSection(backend="tensorrt-rtx", batch=BatchRange(min=1, opt=2, max=4), precision="fp16")
    build_engine(model, "a100", section, out, Events())
    return Built(model, out)


@pytest.fixture
def built(made: Built, tmp_path: Path) -> Built:
    return Built(made.onnx, Path(shutil.copytree(made.folder, tmp_path / "build")))


def test_what_was_built_agrees(built: Built) -> None:
    check = built.check()
    assert (check.status, check.figures["held"], check.figures["lost"]) == ("pass", 2, []), check.detail
    assert check.figures["problems"] == 0 and check.figures["not_examined"] == []


def test_every_change_of_the_metadata_is_seen(made: Built, tmp_path: Path) -> None:
    built = Built(made.onnx, Path(shutil.copytree(made.folder, tmp_path / "build")))
    document, missed, tried = built.document(), set(), 0
    for path, value in leaves(document):
        changed = copy.deepcopy(document)
        inner = changed
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = another(value)
        tried += 1
        try:
            status = built.check(changed).status
        except ArtifactError:
            status = "fail"
        if status != "fail":
            missed.add("/".join(map(str, path)))
    assert missed == UNTOLD
    assert tried > 120


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
        return
    if path:
        yield path, value
    if isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, (*path, index))


def another(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, list):
        return [*value, 1]
    return value + "x" if isinstance(value, str) else value * 1.01 if isinstance(value, float) else value + 1


def test_rows_exchanged_removed_doubled_or_renamed(built: Built) -> None:
    assert "the rows are" in built.failure(lambda d: d["layers"].reverse())
    assert "no row for" in built.failure(lambda d: d["layers"].pop())


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda d: d["layers"].append(copy.deepcopy(d["layers"][0])), "several rows"),
        (lambda d: d["layers"][0].update(name="another.weight"), "no row for"),
        (lambda d: d["layers"][0].update(more=1), "has, or lacks, more"),
        (lambda d: d["layers"][0].pop("engine"), "is not a build's layer list"),
        (lambda d: d["layers"].clear(), "no row for"),
        (lambda d: d["header"].clear(), "the header lacks"),
        (lambda d: d["header"].update(backend="another"), "names the backend 'another'"),
        (lambda d: d["header"].update(target="orin", sm="8.7"), "target is 'orin'"),
        (lambda d: d["header"].update(profile={}), "the profile is"),
        (lambda d: d["header"]["profile"]["x"].update(min=[4, 4, 6, 6], max=[1, 4, 6, 6]), "has the batches"),
        (lambda d: d["summary"].clear(), "is not a build's layer list"),
        (lambda d: d["summary"].update(read_from="hearsay"), "read from 'hearsay'"),
        (lambda d: d["layers"][0]["engine"].update(held=False, dtype="Float", note="Float"), "c.weight: placed as"),
        (lambda d: d["layers"][0].update(pattern="1:4"), "groups of 4 have over 1"),
        (lambda d: d["layers"][0].update(bits=3), "codes lie outside"),
    ],
)  # fmt: skip
def test_metadata_that_is_edited(built: Built, edit: Callable[[Any], Any], said: str) -> None:
    try:
        assert said in built.failure(edit)
    except ArtifactError as error:
        assert said in str(error)


def test_another_engine_model_or_placed_file(built: Built, tmp_path: Path) -> None:
    engine = built.folder / "model.engine"
    engine.write_bytes(engine.read_bytes() + b"\0")
    assert "engine_bytes" in built.check().detail
    model = onnx.load(built.onnx)
    for tensor in model.graph.initializer:
        if tensor.name == "f.weight.scale":
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), tensor.name))
    other = tmp_path / "model.onnx"
    onnx.save(model, other)
    assert "onnx_sha256" in Built(other, built.folder).check().detail
    shutil.copy(built.onnx, built.folder / "placed.onnx")
    assert "placed.onnx" in built.check().detail


@pytest.mark.parametrize("name", ["model.engine", "layers.json", "placed.onnx"])
def test_a_file_that_is_missing(built: Built, name: str) -> None:
    (built.folder / name).unlink()
    try:
        check = built.check()
        assert (check.status, check.detail) == ("fail", f"{name} is missing")
    except ArtifactError as error:
        assert name == "layers.json" and "layers.json" in str(error)


def test_what_cannot_be_examined_is_said(built: Built) -> None:
    (built.folder / "build.log").unlink()
    check = built.check()
    assert (check.status, check.figures["not_examined"]) == ("pass", ["what only the build log told: it is not there"])
    engine = EngineUnderTest(built.folder / "model.engine", built.folder / "layers.json", trusted=False, sha256=None)
    check = check_engine_layers(engine, built.onnx, None, None)
    assert check.status == "pass" and "the placed file is not there" in check.detail
    with pytest.raises(NotCheckedError, match="no engine was built here"):
        check_engine_layers(None, built.onnx, None, None)


@pytest.mark.parametrize("text", ["", "[]", '{"header": 1}', '{"header": {}, "summary": {}, "layers": [1]}', "\udcff"])
def test_hostile_json(built: Built, text: str) -> None:
    (built.folder / "layers.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ArtifactError, match=r"layers\.json is not a build's"):
        built.check()


def test_beside_a_lone_engine_the_files_have_its_name(net: Any, tmp_path: Path) -> None:
    model = net()
    (tmp_path / "m.engine").write_bytes(b"plan")
    layers = write_layers(tmp_path, model, "m.engine")
    check = check_engine_layers(EngineUnderTest(tmp_path / "m.engine", layers, False, None), model, model, None)
    assert check.status == "not checked", check  # without a log nobody says what the engine holds
    assert "shows no constant" in check.detail and check.figures["problems"] == 0


def row(placement: str, held: bool = True, dtype: str | None = "Int4", note: str | None = None) -> dict[str, Any]:
    return {"placement": placement, "engine": {"held": held, "dtype": dtype, "note": note}}


def test_layers_that_lost_their_placement() -> None:
    place = {name: Place("INT4", "int4-storage", "") for name in ("a", "b")}
    good = {"a": row("int4-storage"), "b": row("int4-storage")}
    assert held_layers(good, place)[0] == "pass"
    assert "b: placed as int4-storage, built as float" in held_layers(good | {"b": row("float")}, place)[1]
    assert "b: placed as int4-storage, built as None" in held_layers({"a": good["a"]}, place)[1]
    unknown = row("int4-storage", held=False, dtype=None, note="no constant")
    status, told, figures = held_layers(good | {"b": unknown}, place)
    assert (status, figures["not_told"]) == ("pass", ["b"]) and "nothing is told" in told
    assert held_layers({"a": unknown, "b": unknown}, place)[0] == "not checked"
    lost = row("int4-storage", held=False, dtype="Float", note="engine holds Float")
    assert held_layers(good | {"b": lost}, place)[:2] == ("fail", "b: placed as int4-storage; engine holds Float")
