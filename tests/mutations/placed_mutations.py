"""Mutations of placed.onnx: what the engine is built from."""

from __future__ import annotations

import shutil

import numpy as np
from checkpoint_mutations import damaged, deleted
from graph_mutations import attribute, dropout, no_bias, residual_twice, without
from mutation import Corrupt, Mutation, Subject
from onnx import TensorProto
from onnx_edits import PLACED, Edit, Net, edited, with_weight
from weight_kinds import CORE

NAME = "parity.placed"


def _row(kind: str, edit: Edit, subject: str = "float", lawless: bool = False) -> Mutation:
    return _whole(kind, edited(PLACED, edit), subject, lawless)


def _whole(kind: str, corrupt: Corrupt, subject: str = "float", lawless: bool = False) -> Mutation:
    by = {NAME, "pattern"} if lawless else {NAME}
    return Mutation(kind, "placed.onnx", corrupt, frozenset(by), subject=subject)


def _taken_from(run: str, file: str = PLACED) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        shutil.copy(subject.runs[run] / file, subject.file(PLACED))

    return corrupt


def _bias(net: Net) -> None:
    net.change("again.bias", lambda bias: bias + np.float16(0.5))


def _rounded_twice(net: Net) -> None:
    """One activation in BFLOAT16 between FP16 ones."""
    value = net.node("Relu").output[0]
    net.after(value, "Cast", to=TensorProto.BFLOAT16)
    net.after(f"{value}.after", "Cast", to=TensorProto.FLOAT16)


def _scale_rounded(net: Net) -> None:
    net.change("conv.weight.scale", lambda scale: scale.astype(np.float16).astype(np.float32))


def _tied(net: Net) -> None:
    net.reader_of("again.weight").input[1] = net.reader_of("conv.weight").input[1]


def _step(net: Net) -> None:
    net.change("conv.input.scale", lambda step: np.float32(step * 2))


def _no_quantizer(net: Net) -> None:
    for kind in ("dq", "q"):
        net.remove(net.named(f"conv.input.{kind}"))


def _renamed(net: Net) -> None:
    net.graph.input[0].name = "image"
    net.redirect("input", "image")


PLACED_FILE = [_row(one.kind, with_weight(one), lawless=one.lawless) for one in CORE[:7]] + [
    _row("scales rounded to float16", _scale_rounded),
    _row("two layers read one weight", _tied),
    _row("a bias edited", _bias),
    _row("bias dropped", no_bias),
    _row("a Relu removed", without("Relu", 1)),
    _row("residual added to itself", residual_twice),
    _row("strides 1 instead of 2", attribute("Conv", "strides", [1, 1], 3)),
    _row("batch norm's epsilon 0.1", attribute("BatchNormalization", "epsilon", 0.1)),
    _row("Gemm's alpha 2", attribute("Gemm", "alpha", 2.0)),
    _row("Dropout left on", dropout(0.5)),
    _row("Dropout left on, one in ten million", dropout(1e-7)),
    _row("input renamed", _renamed),
    _row("an activation's step doubled", _step, "int8"),
    _row("a quantizer missing", _no_quantizer, "int8"),
    _row("lowest bit of one code flipped, INT8", with_weight(CORE[0]), "int8"),
    _whole("another run's, with quantized activations", _taken_from("int8")),
    _whole("another run's, without quantized activations", _taken_from("float"), "int8"),
    _whole("last 100 bytes cut off", damaged(PLACED, lambda data: data[:-100]), lawless=True),
    _whole("empty", damaged(PLACED, lambda data: b""), lawless=True),
    _whole("deleted", deleted(PLACED)),
]  # fmt: skip
