"""Mutations of model.onnx where activations are quantized: steps, zero points, types, quantizers gone or added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mutation import Mutation
from onnx import helper
from onnx_edits import MODEL, Edit, Net, edited, with_weight
from weight_kinds import CORE

CONV, STEM, HEAD = "conv.input", "stem.2.output", "head.input"


def _row(kind: str, edit: Edit, *by: str) -> Mutation:
    return Mutation(kind, "model.onnx", edited(MODEL, edit), frozenset(by), subject="int8")


def step(name: str, edit: Callable[[Any], Any]) -> Edit:
    return lambda net: net.change(f"{name}.scale", lambda step: np.float32(edit(step)))


def _exchanged(net: Net) -> None:
    one, other = net.array(f"{CONV}.scale"), net.array("down.input.scale")
    net.put(f"{CONV}.scale", other)
    net.put("down.input.scale", one)


def _half_undone(net: Net) -> None:
    net.put("other.scale", net.array(f"{CONV}.scale") * 2)
    net.named(f"{CONV}.dq").input[1] = "other.scale"


def _zero_point(net: Net) -> None:
    net.change(f"{CONV}.zero_point", lambda _: np.int8(1))


def _unsigned(net: Net) -> None:
    net.change(f"{CONV}.zero_point", lambda _: np.uint8(0))


def _sixteen_bits(net: Net) -> None:
    net.change(f"{CONV}.zero_point", lambda _: np.int16(0))


def _per_channel(net: Net) -> None:
    net.change(f"{CONV}.scale", lambda step: np.full(16, step))
    net.change(f"{CONV}.zero_point", lambda _: np.zeros(16, np.int8))
    for kind in ("q", "dq"):
        net.set(net.named(f"{CONV}.{kind}"), "axis", 1)


def _computed_step(net: Net) -> None:
    """The step of each batch by itself, as dynamic quantization has it."""
    quantize = net.named(f"{CONV}.q")
    net.put("levels", np.float32(127))
    made = [
        helper.make_node("Abs", [quantize.input[0]], ["dynamic.abs"], "dynamic.abs"),
        helper.make_node("ReduceMax", ["dynamic.abs"], ["dynamic.max"], "dynamic.max", keepdims=0),
        helper.make_node("Div", ["dynamic.max", "levels"], ["dynamic.step"], "dynamic.step"),
    ]
    at = list(net.graph.node).index(quantize)
    quantize.input[1] = net.named(f"{CONV}.dq").input[1] = "dynamic.step"
    for node in reversed(made):
        net.graph.node.insert(at, node)


def without_quantizer(name: str) -> Edit:
    def edit(net: Net) -> None:
        net.remove(net.named(f"{name}.dq"))
        net.remove(net.named(f"{name}.q"))

    return edit


def reads_float(reader: str) -> Edit:
    """One of the two that read a quantized activation reads what was quantized; the other one still does not."""

    def edit(net: Net) -> None:
        value, before = net.named(f"{STEM}.dq").output[0], net.named(f"{STEM}.q").input[0]
        node = net.named(f"{CONV}.q") if reader == CONV else net.node("Add")
        at = list(node.input).index(value)
        node.input[at] = before

    return edit


def _one_more(net: Net) -> None:
    """The residual's other branch gets a quantizer too, with a step that is there already."""
    value = net.reader_of("again.weight").output[0]
    quantizer = (f"{HEAD}.scale", f"{HEAD}.zero_point")
    net.after(value, "QuantizeLinear", *quantizer)
    net.after(f"{value}.after", "DequantizeLinear", *quantizer)


def _clipped(net: Net) -> None:
    """Levels -8 to 7 of what are 8 bits."""
    step = float(net.array(f"{CONV}.scale"))
    for name, level in (("low", -8), ("high", 7)):
        net.put(f"clip.{name}", np.float32(level * step))
    net.before(net.named(f"{CONV}.q"), 0, "Clip", "clip.low", "clip.high")


def _integers_shifted(net: Net) -> None:
    net.put("one", np.int8(1))
    net.after(net.named(f"{CONV}.q").output[0], "Add", "one")


def _moved(net: Net) -> None:
    """The quantizer reads what was there before the Relu."""
    net.named(f"{CONV}.q").input[0] = net.node("BatchNormalization").output[0]


def _balanced(net: Net) -> None:
    """Twice the activation's step and half the weight's: the same sums of other integers."""
    net.change(f"{CONV}.scale", lambda step: np.float32(step * 2))
    net.change("conv.weight.scale", lambda scale: scale / 2)


ACTIVATIONS = [
    _row(f"{one.kind}, INT8 container", with_weight(one), *(("pattern", "codes") if one.lawless else ("codes",)))
    for one in CORE[:4]
] + [
    _row("an activation's step doubled", step(CONV, lambda step: step * 2), "codes", "parity.onnx"),
    _row("an activation's step off by its last bit", step(CONV, lambda s: np.nextafter(s, np.float32(9))), "codes"),
    _row("an activation's step negative", step(CONV, np.negative), "pattern", "codes", "parity.onnx"),
    _row("an activation's step zero", step(CONV, lambda _: 0), "pattern", "codes", "parity.onnx"),
    _row("an activation's step NaN", step(CONV, lambda _: np.nan), "pattern", "codes", "parity.onnx"),
    _row("steps of two activations exchanged", _exchanged, "codes", "parity.onnx"),
    _row("dequantized with another step than quantized", _half_undone, "codes", "parity.onnx"),
    _row("an activation's step doubled, its weight's halved", _balanced, "codes", "parity.onnx"),
    _row("an activation's zero point 1", _zero_point, "pattern", "codes", "parity.onnx"),
    _row("an activation unsigned", _unsigned, "codes"),
    _row("an activation in 16 bits", _sixteen_bits, "codes", "parity.onnx"),
    _row("a step for each channel of an activation", _per_channel, "codes", "parity.onnx"),
    _row("a step that is computed as the graph runs", _computed_step, "codes", "parity.onnx"),
    _row("an output's quantizer missing", without_quantizer(STEM), "codes", "parity.onnx"),
    _row("an input's quantizer missing", without_quantizer(CONV), "codes", "parity.onnx"),
    _row("the last input's quantizer missing", without_quantizer(HEAD), "codes", "parity.onnx"),
    _row("one of two readers reads the float tensor: a layer", reads_float(CONV), "parity.onnx"),
    _row("one of two readers reads the float tensor: an addition", reads_float("Add"), "parity.onnx"),
    _row("one quantizer more", _one_more, "codes", "parity.onnx"),
    _row("clipped to 4 bits before it is quantized", _clipped, "codes", "parity.onnx"),
    _row("1 added to an activation's integers", _integers_shifted, "codes", "parity.onnx"),
    _row("quantizer moved to another value", _moved, "codes", "parity.onnx"),
]  # fmt: skip
