"""Mutations of manifest.json, which says what the files are, and of the recipe beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from mutation import Corrupt, Mutation, Subject

MANIFEST, RECIPE = "manifest.json", "recipe.yaml"
MODEL = "export/model.onnx"
DIGEST = frozenset({"digest"})


def _row(kind: str, corrupt: Corrupt, *by: str, code: int = 1, says: str = "", missed: str = "") -> Mutation:
    checks = frozenset(by) if code == 1 else frozenset[str]()
    return Mutation(kind, "manifest", corrupt, checks, code=code, says=says, forged=False, naive=False, missed=missed)


def _json(edit: Callable[[Any], object]) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        path = subject.file(MANIFEST)
        told = json.loads(path.read_text())
        edit(told)
        path.write_text(json.dumps(told))

    return corrupt


def _output(change: Callable[[dict[str, Any]], object]) -> Corrupt:
    """Change what the manifest lists of the exported stage."""
    return _json(lambda told: change(told["stages"]["export"]["outputs"]))


def _entry(**given: Any) -> Corrupt:
    return _output(lambda outputs: outputs[MODEL].update(given))


def _bytes(data: bytes) -> Corrupt:
    return lambda subject: _write(subject, data)


def _write(subject: Subject, data: bytes) -> None:
    subject.file(MANIFEST).write_bytes(data)


def _huge(subject: Subject) -> None:
    with subject.file(MANIFEST).open("r+b") as file:
        file.truncate(200_000_000)  # a hole: it takes no room on the disk


def _cut(subject: Subject) -> None:
    _write(subject, subject.file(MANIFEST).read_bytes()[:-20])


def _deleted(subject: Subject) -> None:
    subject.file(MANIFEST).unlink()


def _folder(subject: Subject) -> None:
    _deleted(subject)
    subject.file(MANIFEST).mkdir()


def _other_runs(subject: Subject) -> None:
    shutil.copy(subject.runs["int8"] / MANIFEST, subject.file(MANIFEST))


def _escape(name: str) -> Corrupt:
    return _output(lambda outputs: outputs.update({name: outputs[MODEL]}))


def _moved_away(outputs: dict[str, Any]) -> None:
    outputs["export/other.onnx"] = outputs.pop(MODEL)


def _exchanged(outputs: dict[str, Any]) -> None:
    golden = "export/golden.safetensors"
    outputs[MODEL], outputs[golden] = outputs[golden], outputs[MODEL]


def _unlisted_file(subject: Subject) -> None:
    (subject.path / "export" / "model.onnx.data").write_bytes(b"not in the manifest")


def _recipe(old: str, new: str) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        path = subject.file(RECIPE)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return corrupt


def _recipe_bytes(data: bytes) -> Corrupt:
    return lambda subject: (subject.file(RECIPE).write_bytes(data), None)[1]


NOT_OURS = "is not a manifest of ours"
MANIFEST_FILE = [
    _row("a sha256 edited", _entry(sha256="0" * 64), "digest"),
    _row("a sha256 in capitals", _output(lambda o: o[MODEL].update(sha256=o[MODEL]["sha256"].upper())), "digest"),
    _row("half a sha256", _output(lambda o: o[MODEL].update(sha256=o[MODEL]["sha256"][:32])), "digest"),
    _row("an empty sha256", _entry(sha256=""), "digest"),
    _row("a size edited", _entry(size=1), "digest"),
    _row("a size negative", _entry(size=-1), "digest"),
    _row("a size a text", _entry(size="large"), code=2, says=NOT_OURS),
    _row("an entry without a size", _output(lambda o: o[MODEL].pop("size")), code=2, says=NOT_OURS),
    _row("an entry a list", _output(lambda o: o.update({MODEL: []})), code=2, says=NOT_OURS),
    _row("two entries exchanged", _output(_exchanged), "digest"),
    _row("an entry removed", _output(lambda o: o.pop(MODEL)), "digest"),
    _row(
        "the engine's entry removed",
        _json(lambda t: t["stages"]["build/a100"]["outputs"].pop("build/a100/model.engine")),
        "digest",
        "parity.engine",
    ),
    _row("every entry removed", _output(lambda o: o.clear()), "digest"),
    _row("an entry renamed", _output(_moved_away), "digest"),
    _row("an entry of no file", _escape("export/more.onnx"), "digest"),
    _row("a file that no entry lists", _unlisted_file, "digest"),
    _row("a path out of the folder", _escape("../model.onnx"), code=2, says=NOT_OURS),
    _row(
        "a path out of the folder and in again", _escape("export/../../float/export/model.onnx"), code=2, says=NOT_OURS
    ),
    _row("an absolute path", _escape("/etc/hostname"), code=2, says=NOT_OURS),
    _row("a path with a null byte", _escape("export/\0"), "digest"),
    _row("a path that is a folder", _escape("export"), "digest"),
    _row("a path of 5000 letters", _escape("export/" + "x" * 5000), code=2, says="name too long"),
    _row("another format", _json(lambda told: told.update(format=2)), code=2, says=NOT_OURS),
    _row("no stages", _json(lambda told: told.pop("stages")), code=2, says=NOT_OURS),
    _row("stages a list", _json(lambda told: told.update(stages=[])), code=2, says=NOT_OURS),
    _row("a stage a number", _json(lambda told: told["stages"].update(export=1)), code=2, says=NOT_OURS),
    _row("the export removed", _json(lambda told: told["stages"].pop("export")), code=2, says="export"),
    _row("the training removed", _json(lambda told: told["stages"].pop("train")), code=2, says="train"),
    _row("last 20 bytes cut off", _cut, code=2, says=NOT_OURS),
    _row("empty", _bytes(b""), code=2, says=NOT_OURS),
    _row("no JSON", _bytes(b"format: 1"), code=2, says=NOT_OURS),
    _row("a list", _bytes(b"[]"), code=2, says=NOT_OURS),
    _row("nested 100000 deep", _bytes(b"[" * 100_000), code=2, says=NOT_OURS),
    _row("bytes that are no text", _bytes(b"\xff\xfe\x00"), code=2, says=NOT_OURS),
    _row("200 MB", _huge, code=2, says=NOT_OURS),
    _row("deleted", _deleted, code=2, says="no manifest.json"),
    _row("a folder of its name", _folder, code=2, says="no manifest.json"),
    _row("another run's", _other_runs, code=2, says="trained with another recipe"),
    _row("recipe: other bits", _recipe("bits: 4", "bits: 3"), code=2, says="trained with another recipe"),
    _row("recipe: another pattern", _recipe("2:4", "1:4"), code=2, says="trained with another recipe"),
    _row("recipe: another model", _recipe("classes: 4", "classes: 5"), code=2, says="trained with another recipe"),
    _row("recipe: other data", _recipe("fake:200", "fake:199"), code=2, says="trained with another recipe"),
    _row("recipe: an unknown key", _recipe("metric_drop", "metric_drops"), code=2, says="metric_drop"),
    _row("recipe: a budget of NaN", _recipe("metric_drop: 0.1", "metric_drop: .nan"), code=2, says="metric_drop"),
    _row("recipe: no YAML", _recipe_bytes(b"a: [1"), code=2, says="not YAML"),
    _row("recipe: empty", _recipe_bytes(b""), code=2, says="not a mapping"),
    _row("recipe: deleted", lambda subject: subject.file(RECIPE).unlink(), code=2, says="recipe"),
]
