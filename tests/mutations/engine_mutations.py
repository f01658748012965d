"""Mutations of the engine, and of layers.json, which says for what and from what it was built and what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from checkpoint_mutations import damaged, deleted
from mutation import Corrupt, Mutation, Subject

from slope_compile.artifacts import FileDigest

ENGINE, LAYERS = "build/a100/model.engine", "build/a100/layers.json"
EXPORTED = "export/layers.json"
PARITY, HELD = "parity.engine", "engine.layers"


def _row(kind: str, corrupt: Corrupt, *by: str, missed: str = "") -> Mutation:
    return Mutation(kind, "engine", corrupt, frozenset(by), header=False, missed=missed)


def _json(edit: Callable[[Any], object], file: str = LAYERS) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        path = subject.file(file)
        told = json.loads(path.read_text())
        edit(told)
        path.write_text(json.dumps(told))

    return corrupt


def _header(**given: Any) -> Corrupt:
    return _json(lambda told: told["header"].update(given))


def _layer(index: int = 1, **given: Any) -> Corrupt:
    return _json(lambda told: told["layers"][index].update(given))


def _engine(index: int = 1, **given: Any) -> Corrupt:
    return _json(lambda told: told["layers"][index]["engine"].update(given))


def _taken_from(run: str, file: str) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        shutil.copy(subject.runs[run] / file, subject.file(file))

    return corrupt


def _rows_exchanged(told: Any) -> None:
    one, other = told["layers"][1], told["layers"][4]
    one["name"], other["name"] = other["name"], one["name"]


def _last_removed(told: Any) -> None:
    told["layers"].pop()


def _twice(told: Any) -> None:
    told["layers"].append(told["layers"][1])


def _one_more(told: Any) -> None:
    told["layers"].append({**told["layers"][1], "name": "more.weight"})


def _bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def _log(subject: Subject) -> None:
    """The log is in no manifest, for it holds times; what it shows of the engine's layers is read again."""
    subject.file("build/a100/build.log").write_text("nothing")


def _with_digest(subject: Subject) -> None:
    shutil.copy(subject.runs["int8"] / ENGINE, subject.file(ENGINE))
    digest = FileDigest.of(subject.file(ENGINE))
    _header(engine_sha256=digest.sha256, engine_bytes=digest.size)(subject)


ENGINE_FILES = [
    _row("engine: a bit flipped", damaged(ENGINE, _bit), HELD),
    _row("engine: second half cut off", damaged(ENGINE, lambda data: data[: len(data) // 2]), HELD),
    _row("engine: empty", damaged(ENGINE, lambda data: b""), HELD),
    _row("engine: a program of its name", damaged(ENGINE, lambda data: b"\x7fELF" + data[4:]), HELD),
    _row("engine: another run's", _taken_from("int8", ENGINE), HELD),
    _row("engine: deleted", deleted(ENGINE), PARITY),
    _row(
        "engine: another run's, with its digest in layers.json", _with_digest,
        missed="an engine is told from another one by running it, which this machine cannot; only the digest tells",
    ),
    Mutation("build.log: edited", "engine", _log, frozenset({HELD}), header=False, naive=False),
    _row("layers.json: another run's", _taken_from("int8", LAYERS), PARITY, HELD),
    _row("layers.json: built from another file", _header(onnx_sha256="0" * 64), PARITY),
    _row("layers.json: another engine's digest", _header(engine_sha256="0" * 64), HELD),
    _row("layers.json: another engine's size", _header(engine_bytes=1), HELD),
    _row("layers.json: another target", _header(target="orin"), HELD),
    _row("layers.json: another SM", _header(sm="7.5"), HELD),
    _row("layers.json: an unknown backend", _header(backend="mine"), HELD),
    _row("layers.json: no header", _json(lambda told: told.pop("header")), PARITY),
    _row("layers.json: header a list", _json(lambda told: told.update(header=[])), PARITY),
    _row("layers.json: a row removed", _json(_last_removed), HELD),
    _row("layers.json: a row more", _json(_one_more), HELD),
    _row("layers.json: a row twice", _json(_twice), HELD),
    _row("layers.json: two rows exchanged", _json(_rows_exchanged), HELD),
    _row("layers.json: a layer renamed", _layer(name="conv"), HELD),
    _row("layers.json: a layer placed elsewhere", _layer(placement="float"), HELD),
    _row("layers.json: another container", _layer(container="FLOAT16"), HELD),
    _row("layers.json: other bits", _layer(bits=8), HELD),
    _row("layers.json: another pattern", _layer(pattern=None), HELD),
    _row("layers.json: a layer that the engine does not hold", _engine(held=False, dtype="Half"), HELD),
    _row("layers.json: a layer held as another type", _engine(dtype="Float"), HELD),
    _row("layers.json: no layers", _json(lambda told: told.update(layers=[])), HELD),
    _row("layers.json: layers a number", _json(lambda told: told.update(layers=1)), HELD),
    _row("layers.json: a row without what the engine holds", _json(lambda told: told["layers"][1].pop("engine")), HELD),
    _row("layers.json: last 5 bytes cut off", damaged(LAYERS, lambda data: data[:-5]), PARITY, HELD),
    _row("layers.json: empty", damaged(LAYERS, lambda data: b""), PARITY, HELD),
    _row("layers.json: nested 100000 deep", damaged(LAYERS, lambda data: b"[" * 100000), PARITY, HELD),
    _row("layers.json: deleted", deleted(LAYERS), PARITY, HELD),
]  # fmt: skip


def _listed(kind: str, corrupt: Corrupt, subject: str = "float", missed: str = "") -> Mutation:
    by = frozenset() if missed else frozenset({HELD})
    return Mutation(kind, "layers.json", corrupt, by, subject=subject, header=False, missed=missed)


def _of_export(**given: Any) -> Corrupt:
    return _json(lambda told: told["layers"][1].update(given), EXPORTED)


ABSENT = "the list is told, not judged by: what a layer is comes from the checkpoint and from the model itself"
EXPORTED_LAYERS = [
    _listed("other bits", _of_export(bits=8)),
    _listed("another pattern", _of_export(pattern=None)),
    _listed("another size", _json(lambda told: told["layers"][1]["bytes"].update(file=1), EXPORTED)),
    _listed("another run's", _taken_from("int8", EXPORTED)),
    _listed("empty", damaged(EXPORTED, lambda data: b"")),
    _listed("a row removed", _json(lambda told: told["layers"].pop(), EXPORTED), missed=ABSENT),
    _listed("deleted", deleted(EXPORTED), missed=ABSENT),
    _listed("other bits, before an engine is built", _of_export(bits=8), "unbuilt", ABSENT),
]
