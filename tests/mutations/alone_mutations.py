"""Mutations of an exported model that lies alone, with its golden samples and its layer list beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from activation_mutations import CONV, HEAD, STEM, reads_float, step, without_quantizer
from checkpoint_mutations import damaged, edited_tensors
from graph_mutations import no_bias, without
from mutation import Corrupt, Mutation, Subject
from onnx_edits import edited, with_weight
from weight_kinds import WEIGHT_KINDS, WeightKind

ALONE, MODEL, GOLDEN, LAYERS = "model.onnx alone", "model.onnx", "model.golden.safetensors", "model.layers.json"
PARITY = "parity.onnx"


def _row(kind: str, corrupt: Corrupt, *by: str, subject: str = "alone") -> Mutation:
    return Mutation(kind, ALONE, corrupt, frozenset(by), subject, naive=False)


def _listed(edit: Callable[[Any], object]) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        path = subject.file(LAYERS)
        told = json.loads(path.read_text())
        edit(told)
        path.write_text(json.dumps(told))

    return corrupt


SAME_PRODUCTS = "codes and scale of a channel both negated: the same products"
LAST_BIT = "one scale off by its last bit"
STEPS = {
    "an activation's step doubled": step(CONV, lambda value: value * 2),
    "an activation's step off by its last bit": step(CONV, lambda value: np.nextafter(value, np.float32(9))),
    "an output's quantizer missing": without_quantizer(STEM),
    "an input's quantizer missing": without_quantizer(CONV),
    "the last input's quantizer missing": without_quantizer(HEAD),
}
READERS = {
    "one of two readers reads the float tensor: a layer": reads_float(CONV),
    "one of two readers reads the float tensor: an addition": reads_float("Add"),
}


def _weight(one: WeightKind) -> Mutation:
    changed = edited(MODEL, with_weight(one))
    by = {"pattern"} if one.kind == SAME_PRODUCTS else {PARITY, "pattern"} if one.lawless else {PARITY}
    return _row(one.kind, changed, "codes", *(by if one.kind != LAST_BIT else ()))


def _higher(tensors: dict[str, Any], texts: dict[str, str]) -> None:
    tensors["outputs"] = tensors["outputs"] + np.float32(1e-3)


MODEL_ALONE = (
    [_weight(one) for one in WEIGHT_KINDS]
    + [_row(kind, edited(MODEL, edit), PARITY, "codes", subject="alone int8") for kind, edit in STEPS.items()]
    + [_row(kind, edited(MODEL, edit), PARITY, subject="alone int8") for kind, edit in READERS.items()]
    + [
        _row("bias dropped", edited(MODEL, no_bias), PARITY),
        _row("a Relu removed", edited(MODEL, without("Relu", 1)), PARITY),
        _row("golden: outputs off by 1e-3", edited_tensors(GOLDEN, _higher), PARITY),
        _row("golden: last 5 bytes cut off", damaged(GOLDEN, lambda data: data[:-5]), PARITY),
        _row("golden: empty", damaged(GOLDEN, lambda data: b""), PARITY),
        _row("layer list: fewer bits", _listed(lambda told: told["layers"][1].update(bits=2)), "pattern", "codes"),
        _row(
            "layer list: another pattern",
            _listed(lambda told: told["layers"][1].update(pattern="1:4")),
            "pattern",
            "codes",
        ),
        _row("layer list: more bits", _listed(lambda told: told["layers"][1].update(bits=8)), "codes"),
        _row("layer list: a row removed", _listed(lambda told: told["layers"].pop()), "codes"),
        _row("layer list: empty", damaged(LAYERS, lambda data: b""), "codes"),
    ]
)
