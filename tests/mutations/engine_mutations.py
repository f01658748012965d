"""Mutations of the engine, and of layers.json, which says for what and from what it was built and what it holds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from checkpoint_mutations import damaged, deleted
from mutation import Corrupt, Mutation, Subject
from onnx import numpy_helper
from onnx_edits import PLACED

from slope_compile.artifacts import FileDigest

ENGINE, LAYERS, LOG = "build/a100/model.engine", "build/a100/layers.json", "build/a100/build.log"
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
    subject.file(LOG).write_text("nothing")


def _digest_follows(subject: Subject) -> None:
    """layers.json says of the engine that lies there what it says of the right one."""
    digest = FileDigest.of(subject.file(ENGINE))
    _header(engine_sha256=digest.sha256, engine_bytes=digest.size)(subject)


def _with_digest(run: str, *more: str) -> Corrupt:
    """Return what takes another run's engine, and further files of its build, and lets layers.json say so."""

    def corrupt(subject: Subject) -> None:
        exported = json.loads(subject.file(LAYERS).read_text())["header"]["onnx_sha256"]
        for file in (ENGINE, *more):
            shutil.copy(subject.runs[run] / file, subject.file(file))
        _header(onnx_sha256=exported)(subject)
        _digest_follows(subject)

    return corrupt


def _built_in(tensor: str, change: Callable[[Any], Any]) -> Corrupt:
    """Return what changes a tensor of the placed file where the engine holds it, and its digest in layers.json."""

    def corrupt(subject: Subject) -> None:
        tensors = {one.name: one for one in onnx.load(subject.file(PLACED)).graph.initializer}
        before = numpy_helper.to_array(tensors[tensor])
        data = subject.file(ENGINE).read_bytes()
        held = tensors[tensor].raw_data
        assert data.count(held) == 1
        after = numpy_helper.from_array(np.asarray(change(before.copy()), before.dtype)).raw_data
        subject.file(ENGINE).write_bytes(data.replace(held, after))
        _digest_follows(subject)

    return corrupt


def _kernel(subject: Subject) -> None:
    damaged(ENGINE, _bit)(subject)
    _digest_follows(subject)


def _first_nonzero(codes: Any) -> Any:
    codes[tuple(np.argwhere(codes)[0])] ^= 1
    return codes


def _doubled(scale: Any) -> Any:
    scale[0] *= 2
    return scale


ENGINE_FILES = [
    _row("engine: a bit flipped", damaged(ENGINE, _bit), HELD),
    _row("engine: second half cut off", damaged(ENGINE, lambda data: data[: len(data) // 2]), HELD),
    _row("engine: empty", damaged(ENGINE, lambda data: b""), HELD),
    _row("engine: a program of its name", damaged(ENGINE, lambda data: b"\x7fELF" + data[4:]), HELD),
    _row("engine: another run's", _taken_from("int8", ENGINE), HELD),
    _row("engine: deleted", deleted(ENGINE), PARITY),
    _row("engine: another run's, with its digest in layers.json", _with_digest("int8"), HELD),
    _row("engine: that of another training, with its digest in layers.json", _with_digest("other"), HELD),
    _row("engine: that of another training, with its layer list and log", _with_digest("other", LAYERS, LOG), HELD),
    _row("engine: one code of its own changed", _built_in("conv.weight.codes", _first_nonzero), HELD),
    _row("engine: one scale of its own doubled", _built_in("conv.weight.scale", _doubled), HELD),
    _row(
        "engine: a bit of its kernels flipped, with its digest in layers.json", _kernel,
        missed="what of an engine is no weight is told by running it, which this machine cannot; only the digest tells",
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


def _listed(kind: str, corrupt: Corrupt, *by: str, subject: str = "float") -> Mutation:
    return Mutation(kind, "layers.json", corrupt, frozenset({"codes", *by}), subject=subject, header=False)


def _of_export(**given: Any) -> Corrupt:
    return _json(lambda told: told["layers"][1].update(given), EXPORTED)


EXPORTED_LAYERS = [
    _listed("other bits", _of_export(bits=8), HELD),
    _listed("another pattern", _of_export(pattern=None), HELD),
    _listed("another size", _json(lambda told: told["layers"][1]["bytes"].update(file=1), EXPORTED), HELD),
    _listed("another run's", _taken_from("int8", EXPORTED), HELD),
    _listed("empty", damaged(EXPORTED, lambda data: b""), HELD),
    _listed("a row removed", _json(lambda told: told["layers"].pop(), EXPORTED)),
    _listed("a row twice", _json(lambda told: told["layers"].append(told["layers"][1]), EXPORTED)),
    _listed("a row more", _json(_one_more, EXPORTED)),
    _listed("deleted", deleted(EXPORTED)),
    _listed("other bits, before an engine is built", _of_export(bits=8), subject="unbuilt"),
]
