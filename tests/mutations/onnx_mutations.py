"""Mutations of model.onnx that concern its weights, and of the file as a whole."""

from __future__ import annotations

import shutil

import numpy as np
from mutation import Mutation, Subject
from onnx import TensorProto, helper
from onnx_edits import MODEL, Edit, Net, edited, with_weight
from weight_kinds import WEIGHT_KINDS

CONV = "conv.weight"


def _row(kind: str, edit: Edit, *by: str, missed: str = "", subject: str = "float") -> Mutation:
    return Mutation(kind, "model.onnx", edited(MODEL, edit), frozenset(by), subject=subject, missed=missed)


def _zero_point(net: Net, values: list[int]) -> None:
    zero = helper.make_tensor(f"{CONV}.zero_point", TensorProto.INT4, [16], (values * 16)[:16])
    net.graph.initializer.append(zero)
    net.named(f"{CONV}.dq").input.append(f"{CONV}.zero_point")


def _values(net: Net, layer: str = CONV) -> np.ndarray:
    coded = net.coded(layer)
    return coded.codes.astype(np.float32) * coded.scale.reshape(-1, *[1] * (coded.codes.ndim - 1))


def _constant_instead(net: Net, name: str, dtype: type = np.float32) -> None:
    """The layer's values as floats, called `name`; the codes go."""
    values = _values(net).astype(dtype)
    net.graph.node.remove(net.named(f"{CONV}.dq"))
    net.put(name, values)
    if dtype is not np.float32:
        net.graph.node.insert(0, helper.make_node("Cast", [name], [CONV], "back", to=TensorProto.FLOAT))
    else:
        net.redirect(CONV, name)


def _in_float(net: Net) -> None:
    _constant_instead(net, CONV)


def _in_half(net: Net) -> None:
    _constant_instead(net, f"{CONV}.half", np.float16)


def _other_name(net: Net) -> None:
    _constant_instead(net, "somebody.elses")


def _renamed(net: Net) -> None:
    net.tensor(f"{CONV}.codes").name = "other.weight.codes"
    net.named(f"{CONV}.dq").input[0] = "other.weight.codes"


def _tied(net: Net) -> None:
    net.reader_of("again.weight").input[1] = CONV


def _exchanged(net: Net) -> None:
    one, other = net.reader_of(CONV), net.reader_of("again.weight")
    one.input[1], other.input[1] = other.input[1], one.input[1]


def _computed(net: Net) -> None:
    net.put("one.and.a.half", np.float32(1.5))
    net.before(net.reader_of(CONV), 1, "Mul", "one.and.a.half")


def _rounded(net: Net) -> None:
    conv = net.reader_of(CONV)
    net.before(conv, 1, "Cast", to=TensorProto.FLOAT16)
    net.before(conv, 1, "Cast", to=TensorProto.FLOAT)


def _scale_over_inputs(net: Net) -> None:
    net.set(net.named(f"{CONV}.dq"), "axis", 1)


def _blocks(net: Net) -> None:
    """One scale for 8 input channels, and the second half of them gets another."""
    net.set(net.named("mix.weight.dq"), "block_size", 16)
    net.set(net.named("mix.weight.dq"), "axis", 1)
    net.change("mix.weight.scale", lambda scale: np.stack([scale, scale * np.float32(1.25)], 1))


def _block_attribute(net: Net) -> None:
    net.set(net.named(f"{CONV}.dq"), "block_size", 4)


def _nibbles(net: Net) -> None:
    """What a reader of the other nibble order would have: the two codes of each byte exchanged."""
    net.change(f"{CONV}.codes", lambda codes: codes.reshape(-1, 2)[:, ::-1].reshape(codes.shape))


def _unsigned(net: Net) -> None:
    net.tensor(f"{CONV}.codes").data_type = TensorProto.UINT4


def _eight_bits(net: Net) -> None:
    """An INT8 container, and in it a code that 4 bits do not have."""
    codes = net.array(f"{CONV}.codes")
    codes[tuple(np.argwhere(codes == codes.max())[0])] = 8
    net.graph.initializer.remove(net.tensor(f"{CONV}.codes"))
    net.put(f"{CONV}.codes", codes)


def _lowest(net: Net) -> None:
    """-8 is a 4-bit number, but no code that training gives this weight."""

    def change(codes: np.ndarray) -> None:
        codes[tuple(np.argwhere(codes)[0])] = -8

    net.change(f"{CONV}.codes", change)


def _short(net: Net) -> None:
    tensor = net.tensor(f"{CONV}.codes")
    tensor.raw_data = tensor.raw_data[:-1]


def _dims(net: Net) -> None:
    tensor = net.tensor(f"{CONV}.codes")
    del tensor.dims[:]
    tensor.dims.extend([16, 16, 9, 1])


def _groups_of_inputs(net: Net) -> None:
    net.change(f"{CONV}.codes", lambda codes: codes[:, [4, 1, 2, 3, 0, *range(5, 16)]])


def _quantized_as_it_runs(net: Net) -> None:
    _in_float(net)
    net.graph.node.insert(0, helper.make_node("QuantizeLinear", [CONV, "s"], ["q"], "q", axis=0, output_dtype=3))
    net.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "s"], ["dq"], "dq", axis=0))
    net.tensor(f"{CONV}.scale").name = "s"
    net.reader_of(CONV)
    next(n for n in net.graph.node if n.op_type == "Conv" and n.input[1] == CONV).input[1] = "dq"


def _without_transpose(net: Net) -> None:
    """The square matrix the wrong way round: MatMul reads it as it is stored."""
    reader = net.reader_of("mix.weight")
    net.remove(next(n for n in net.graph.node if n.output[0] == reader.input[1]))


def _without_scale(net: Net) -> None:
    """The integers themselves, cast to floats."""
    dequantize = net.named(f"{CONV}.dq")
    cast = helper.make_node("Cast", [dequantize.input[0]], [CONV], "cast", to=TensorProto.FLOAT)
    dequantize.CopyFrom(cast)


WEIGHTS = [
    _row(one.kind, with_weight(one), *(("pattern", "codes") if one.lawless else ("codes",))) for one in WEIGHT_KINDS
] + [
    _row("input channels of two groups exchanged", _groups_of_inputs, "pattern", "codes"),
    _row("zero point 1 in one channel", lambda net: _zero_point(net, [0] * 15 + [1]), "pattern", "codes"),
    _row("zero point 1 in every channel", lambda net: _zero_point(net, [1]), "pattern", "codes"),
    _row("scale along the input channels", _scale_over_inputs, "codes"),
    _row("scale in blocks, one of them off", _blocks, "codes"),
    _row("block_size that the scale does not have", _block_attribute, "pattern", "codes"),
    _row("two codes of each byte exchanged", _nibbles, "pattern", "codes"),
    _row("codes declared UINT4", _unsigned, "pattern", "codes"),
    _row("a code of 8 in an INT8 container", _eight_bits, "pattern", "codes"),
    _row("a code of -8", _lowest, "codes"),
    _row("weight as float32 values", _in_float, "pattern", "codes"),
    _row("weight as float16 values", _in_half, "codes"),
    _row("weight as float32 values of another name", _other_name, "codes"),
    _row("weight quantized as the graph runs", _quantized_as_it_runs, "pattern", "codes"),
    _row("weight rounded to float16 behind its codes", _rounded, "codes"),
    _row("weight multiplied behind its codes", _computed, "codes"),
    _row("codes without their scale", _without_scale, "pattern", "codes"),
    _row("weight of another name", _renamed, "codes"),
    _row("two layers read one weight", _tied, "codes"),
    _row("weights of two layers exchanged", _exchanged, "parity.onnx"),
    _row("Transpose of a square matrix left out", _without_transpose, "pattern", "codes"),
    _row("codes one byte short", _short, "pattern", "codes", "parity.onnx"),
    _row("shape of the codes changed", _dims, "codes"),
]  # fmt: skip


def _cut(subject: Subject) -> None:
    path = subject.file(MODEL)
    path.write_bytes(path.read_bytes()[:-100])


def _empty(subject: Subject) -> None:
    subject.file(MODEL).write_bytes(b"")


def _text(subject: Subject) -> None:
    subject.file(MODEL).write_text('{"not": "a model"}')


def _gone(subject: Subject) -> None:
    subject.file(MODEL).unlink()


def _of(run: str, file: str = MODEL):  # type: ignore[no-untyped-def]
    def corrupt(subject: Subject) -> None:
        shutil.copy(subject.runs[run] / file, subject.file(MODEL))

    return corrupt


def _whole(kind: str, corrupt, *by: str) -> Mutation:  # type: ignore[no-untyped-def]
    return Mutation(kind, "model.onnx", corrupt, frozenset(by))


WHOLE = [
    _whole("last 100 bytes cut off", _cut, "pattern", "codes", "parity.onnx"),
    _whole("empty", _empty, "pattern", "codes", "parity.onnx"),
    _whole("a JSON file of its name", _text, "pattern", "codes", "parity.onnx"),
    _whole("deleted", _gone, "pattern", "codes", "parity.onnx"),
    _whole("another run's", _of("other"), "codes", "parity.onnx"),
    _whole("that of a run with quantized activations", _of("int8"), "codes", "parity.onnx"),
    _whole("the placed file in its place", _of("float", "build/a100/placed.onnx"), "codes"),
]  # fmt: skip
