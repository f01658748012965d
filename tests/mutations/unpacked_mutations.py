"""Mutations of a bundle's folder on a device: the unpacked files, and the engine that was built of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from checkpoint_mutations import damaged, deleted
from mutation import Corrupt, Mutation, Subject
from onnx_edits import Edit, edited, with_weight
from weight_kinds import CORE

UNPACKED = "unpacked bundle"
BOTH = ("pattern", "codes")
ENGINE, LAYERS = "build/a100/model.engine", "build/a100/layers.json"


def _row(kind: str, corrupt: Corrupt, *by: str, naive: bool = True) -> Mutation:
    return Mutation(kind, UNPACKED, corrupt, frozenset(by), "unpacked", header=False, naive=naive)


def _refused(kind: str, corrupt: Corrupt, says: str) -> Mutation:
    return Mutation(kind, UNPACKED, corrupt, frozenset(), "unpacked", 2, says, naive=False)


def _onnx(file: str, edit: Edit) -> Corrupt:
    return edited(f"bundle/{file}", edit)


def _taken_from(file: str, run: str, theirs: str) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        shutil.copy(subject.runs[run] / theirs, subject.file(file))

    return corrupt


def _json(file: str, edit: Callable[[Any], object]) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        told = json.loads(subject.file(file).read_text())
        edit(told)
        subject.file(file).write_text(json.dumps(told))

    return corrupt


def _not_held(told: Any) -> None:
    told["layers"][1]["engine"].update(held=False, dtype="Half")


UNPACKED_FILES = [
    _row(
        f"model.onnx: {one.kind}",
        _onnx("model.onnx", with_weight(one)),
        *(BOTH if one.lawless else ("codes",)),
        "placement",
        "parity.engine",
    )
    for one in CORE[:4]
] + [
    _row("placed.onnx: lowest bit of one code flipped", _onnx("placed.onnx", with_weight(CORE[0])), "placement"),
    _row(
        "codes.safetensors: another run's",
        _taken_from("bundle/codes.safetensors", "other", "train/codes.safetensors"),
        "codes",
    ),
    _row(
        "golden.safetensors: another run's",
        _taken_from("bundle/golden.safetensors", "other", "export/golden.safetensors"),
        "parity.onnx",
    ),
    _row("golden.safetensors: cut off", damaged("bundle/golden.safetensors", lambda data: data[:-5]), "parity.onnx"),
    _row("model.onnx: deleted", deleted("bundle/model.onnx"), *BOTH, "placement"),
    _row(
        "placement.json: cut off",
        damaged("bundle/placement.json", lambda data: data[:-5]),
        "placement",
        "engine.layers",
    ),
    _row(
        "placement.json: a row removed",
        _json("bundle/placement.json", lambda t: t["places"].pop()),
        "placement",
        "engine.layers",
    ),
    _row("layers.json: a layer that the engine does not hold", _json(LAYERS, _not_held), "engine.layers"),
    _row("layers.json: a row removed", _json(LAYERS, lambda told: told["layers"].pop()), "engine.layers"),
    _row(
        "layers.json: built from another file",
        _json(LAYERS, lambda t: t["header"].update(onnx_sha256="0" * 64)),
        "parity.engine",
    ),
    _row("layers.json: cut off", damaged(LAYERS, lambda data: data[:-5]), "engine.layers", "parity.engine"),
    _row("engine: another run's", _taken_from(ENGINE, "int8", ENGINE), "engine.layers"),
    _row("engine: deleted", deleted(ENGINE), "parity.engine"),
    _refused(
        "bundle.json: edited", damaged("bundle/bundle.json", lambda d: d.replace(b'"fp16"', b'"fp32"', 1)), "was edited"
    ),
    _refused("bundle.json: cut off", damaged("bundle/bundle.json", lambda data: data[:-5]), "bundle.json"),
]
