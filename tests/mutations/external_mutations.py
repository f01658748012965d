"""Mutations of tensors outside model.onnx: the file that holds them, and what the model says of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from mutation import Mutation, Subject
from onnx import TensorProto, numpy_helper
from onnx_edits import MODEL, Net, rewrite
from weight_kinds import CORE, Coded, WeightKind

DATA = f"{MODEL}.data"
BOTH = ("pattern", "codes")
UNLISTED = ("digest", *BOTH)  # the model names a file that no manifest lists, or none
LAYER = "conv.weight.codes"


def _row(kind: str, corrupt: Callable[[Subject], None], *by: str) -> Mutation:
    return Mutation(kind, "model.onnx.data", corrupt, frozenset(by), subject="external")


def _where(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _weight(kind: WeightKind) -> Callable[[Subject], None]:
    """Change the tensors' bytes in place; the model stays as it is."""

    def corrupt(subject: Subject) -> None:
        model = onnx.load(subject.file(MODEL))
        here = onnx.load(subject.file(MODEL), load_external_data=False)
        whole, places = Net(model), Net(here)
        coded = kind.change(whole.coded(kind.layer))
        data = bytearray(subject.file(DATA).read_bytes())
        for name, array in ((f"{kind.layer}.codes", coded.codes), (f"{kind.layer}.scale", coded.scale)):
            whole.put(name, array)
            raw, tensor = whole.tensor(name).raw_data, places.tensor(name)
            if tensor.external_data:
                start = int(_where(tensor)["offset"])
                data[start : start + len(raw)] = raw
            else:
                tensor.raw_data = raw
        subject.file(DATA).write_bytes(data)
        subject.file(MODEL).write_bytes(here.SerializeToString())

    return corrupt


def _entry(name: str, **given: str | None) -> Callable[[Subject], None]:
    """Change what the model says of where a tensor lies."""

    def edit(net: Net) -> None:
        tensor = net.tensor(name)
        entries = {**_where(tensor), **given}
        del tensor.external_data[:]
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=value)

    return lambda subject: rewrite(subject.file(MODEL), edit)


def _shifted(subject: Subject) -> None:
    def edit(net: Net) -> None:
        for entry in net.tensor(LAYER).external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + 64)

    rewrite(subject.file(MODEL), edit)


def _exchanged(subject: Subject) -> None:
    def edit(net: Net) -> None:
        one, other = net.tensor(LAYER), net.tensor("again.weight.codes")
        kept = [(entry.key, entry.value) for entry in one.external_data]
        del one.external_data[:]
        one.external_data.extend(other.external_data)
        del other.external_data[:]
        for key, value in kept:
            other.external_data.add(key=key, value=value)

    rewrite(subject.file(MODEL), edit)


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Subject], None]:
    def corrupt(subject: Subject) -> None:
        path = subject.file(DATA)
        path.write_bytes(change(path.read_bytes()))

    return corrupt


def _gone(subject: Subject) -> None:
    subject.file(DATA).unlink()


def _other_runs(subject: Subject) -> None:
    """The tensors of another run, laid out the same way."""
    model = onnx.load(subject.runs["other"] / MODEL)
    ours = onnx.load(subject.file(MODEL), load_external_data=False)
    data = bytearray(subject.file(DATA).read_bytes())
    for tensor in model.graph.initializer:
        place = Net(ours).tensor(tensor.name)
        if place.external_data:
            start, raw = int(_where(place)["offset"]), numpy_helper.to_array(tensor)
            packed = numpy_helper.from_array(raw).raw_data
            data[start : start + len(packed)] = packed
    subject.file(DATA).write_bytes(data)


def _outside(subject: Subject, name: str) -> Path:
    elsewhere = subject.path.parent / name
    shutil.move(subject.file(DATA), elsewhere)
    return elsewhere


def _parent(subject: Subject) -> None:
    """The file lies one folder up, and the model says so."""
    shutil.copy(subject.file(DATA), subject.path / "up.data")
    _entry(LAYER, location="../up.data")(subject)


def _absolute(subject: Subject) -> None:
    shutil.copy(subject.file(DATA), subject.path / "far.data")
    _entry(LAYER, location=str((subject.path / "far.data").resolve()))(subject)


def _link(subject: Subject) -> None:
    subject.file(DATA).symlink_to(_outside(subject, "linked.data"))


def _folder(subject: Subject) -> None:
    _gone(subject)
    subject.file(DATA).mkdir()


def _pipe(subject: Subject) -> None:
    """A pipe that nobody writes to: whoever opens it waits for ever."""
    _gone(subject)
    os.mkfifo(subject.file(DATA))


def _zeros(coded: Coded) -> Coded:
    return Coded(np.zeros_like(coded.codes), coded.scale)


EXTERNAL = [
    _row(one.kind, _weight(one), *(BOTH if one.lawless else ("codes",))) for one in CORE[:7]
] + [
    _row("last byte cut off", _bytes(lambda data: data[:-1]), *BOTH),
    _row("second half cut off", _bytes(lambda data: data[: len(data) // 2]), *BOTH),
    _row("empty", _bytes(lambda data: b""), *BOTH),
    _row("zeros of the same length", _bytes(lambda data: bytes(len(data))), *BOTH),
    _row("one byte put before the first", _bytes(lambda data: b"\0" + data), *BOTH),
    _row("deleted", _gone, *UNLISTED),
    _row("another run's tensors", _other_runs, "codes"),
    _row("a folder of its name", _folder, *UNLISTED),
    _row("a pipe of its name", _pipe, *UNLISTED),
    replace(_row("a link to a file elsewhere, of the same bytes", _link, *BOTH), naive=False),
    _row("offset shifted by 64", _shifted, *BOTH),
    _row("offset behind the end", _entry(LAYER, offset="999999"), *BOTH),
    _row("offset negative", _entry(LAYER, offset="-64"), *BOTH),
    _row("offset no number", _entry(LAYER, offset="0x10"), *BOTH),
    _row("length one short", _entry(LAYER, length="1151"), *BOTH),
    _row("places of two tensors exchanged", _exchanged, "codes"),
    _row("a file that is not there", _entry(LAYER, location="other.data"), *UNLISTED),
    _row("a file in the folder above", _parent, *UNLISTED),
    _row("an absolute path", _absolute, *UNLISTED),
    _row("no location", _entry(LAYER, location=None), *UNLISTED),
]  # fmt: skip
