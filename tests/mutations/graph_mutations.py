"""Mutations of model.onnx that leave every weight as it is: operators, attributes, biases, what goes in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mutation import Mutation
from onnx import TensorProto, helper
from onnx_edits import MODEL, Edit, Net, edited

PARITY, REPEATABLE = "parity.onnx", "repeatable"


def _row(kind: str, edit: Edit, *by: str, missed: str = "") -> Mutation:
    checks = frozenset() if missed else frozenset(by or (PARITY,))
    return Mutation(kind, "model.onnx", edited(MODEL, edit), checks, missed=missed)


def _change(name: str, edit: Callable[[Any], Any]) -> Edit:
    return lambda net: net.change(name, edit)


def _put(place: Any, value: float) -> Callable[[Any], None]:
    def change(array: Any) -> None:
        array[place] = value

    return change


def attribute(op: str, name: str, value: Any, index: int = 0) -> Edit:
    return lambda net: net.set(net.node(op, index), name, value)


def _attributes(op: str, index: int = 0, **given: Any) -> Edit:
    def edit(net: Net) -> None:
        for name, value in given.items():
            net.set(net.node(op, index), name, value)

    return edit


def behind(op: str, index: int, *made: Any, **given: Any) -> Edit:
    """A node behind the index-th node of an operator: (its operator, then constants it reads), and attributes."""

    def edit(net: Net) -> None:
        _insert(net, net.node(op, index).output[0], *made, **given)

    return edit


def _insert(net: Net, value: str, op: str, *constants: Any, **given: Any) -> None:
    names = [f"constant.{i}" for i in range(len(constants))]
    for name, constant in zip(names, constants, strict=True):
        net.put(name, constant)
    net.after(value, op, *names, **given)


def no_bias(net: Net) -> None:
    del net.reader_of("again.weight").input[2:]


def _bias_elsewhere(net: Net) -> None:
    """The bias of one layer goes to another of the same width."""
    one, other = net.reader_of("again.weight"), net.reader_of("stem.0.weight")
    one.input[2], other.input[2] = other.input[2], one.input[2]


def _statistics(net: Net) -> None:
    norm = net.node("BatchNormalization")
    norm.input[3], norm.input[4] = norm.input[4], norm.input[3]


def _affine(net: Net) -> None:
    norm = net.node("BatchNormalization")
    norm.input[1], norm.input[2] = norm.input[2], norm.input[1]


def _norms(net: Net) -> None:
    one, other = net.node("BatchNormalization"), net.node("BatchNormalization", 1)
    for index in range(1, 5):
        one.input[index], other.input[index] = other.input[index], one.input[index]


def without(op: str, index: int = 0) -> Edit:
    return lambda net: net.remove(net.node(op, index))


def _residual_from_elsewhere(net: Net) -> None:
    add = _residual(net)
    add.input[0] = net.node("Conv").output[0]


def _residual(net: Net) -> Any:
    made = net.reader_of("again.weight").output[0]
    return next(node for node in net.graph.node if node.op_type == "Add" and made in node.input)


def _no_residual(net: Net) -> None:
    add = _residual(net)
    made = net.reader_of("again.weight").output[0]
    net.redirect(add.output[0], made)
    net.graph.node.remove(add)


def residual_twice(net: Net) -> None:
    add = _residual(net)
    add.input[:] = [add.input[0]] * 2


def _subtracted(net: Net) -> None:
    _residual(net).op_type = "Sub"


def _reshaped(net: Net) -> None:
    """Same shape, other order: Reshape where the tokens were transposed."""
    turn = next(n for n in net.graph.node if n.op_type == "Transpose" and n.input[0] == net.node("Reshape").output[0])
    net.put("tokens", np.array([0, -1, 32], np.int64))
    turn.CopyFrom(helper.make_node("Reshape", [turn.input[0], "tokens"], list(turn.output), turn.name))


def _output_renamed(net: Net) -> None:
    net.redirect("output", "scores")
    next(n for n in net.graph.node if "output" in n.output).output[0] = "scores"
    net.graph.output[0].name = "scores"


def _second_output(net: Net) -> None:
    net.graph.output.append(helper.make_tensor_value_info(net.node("Relu").output[0], TensorProto.FLOAT, None))


def _second_input(net: Net) -> None:
    net.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))
    net.after("output", "Add", "more")


def _input_shape(net: Net) -> None:
    for axis in (2, 3):
        net.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 16


def _mean_over_channels(net: Net) -> None:
    net.change(net.node("ReduceMean").input[1], lambda _: np.array([2], np.int64))


def _last_bit(net: Net) -> None:
    net.change("again.bias", lambda bias: np.nextafter(bias, np.float32(1)))


def _fixed_batch(net: Net) -> None:
    net.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _input_type(net: Net) -> None:
    net.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def _opset(net: Net) -> None:
    net.model.opset_import[0].version = 9


def _unknown_opset(net: Net) -> None:
    net.model.opset_import[0].version = 99


def _scaled_input(net: Net) -> None:
    net.put("half", np.float32(0.5))
    net.before(net.node("Conv"), 0, "Mul", "half")


def _half(net: Net) -> None:
    """One activation rounded to float16 on its way."""
    value = net.node("Relu").output[0]
    net.after(value, "Cast", to=TensorProto.FLOAT16)
    net.after(f"{value}.after", "Cast", to=TensorProto.FLOAT)


def _noise(scale: float) -> Edit:
    def edit(net: Net) -> None:
        value = net.node("Relu").output[0]
        net.after(value, "Add", "noise")
        made = helper.make_node("RandomNormalLike", [value], ["noise"], "noise", scale=scale)
        net.graph.node.insert([value in n.output for n in net.graph.node].index(True) + 1, made)

    return edit


def dropout(ratio: float, on: bool = True) -> Edit:
    def edit(net: Net) -> None:
        _insert(net, net.node("Relu").output[0], "Dropout", np.array(ratio, np.float32), np.array(on))

    return edit


def _rarely(net: Net) -> None:
    """A mask that is 1 but for one number in 10^9, which no sample shows."""
    net.put("rate", np.full(1, 1 - 1e-9, np.float64))
    value = net.node("Relu").output[0]
    net.after(value, "Mul", "mask")
    at = [value in n.output for n in net.graph.node].index(True) + 1
    net.graph.node.insert(at, helper.make_node("Bernoulli", ["rate"], ["mask"], "mask", dtype=TensorProto.FLOAT))


def _dropout_in_a_branch(net: Net) -> None:
    value = net.node("Relu").output[0]
    for name, constant in {"yes": np.array(True), "rare": np.array(1e-7, np.float32)}.items():
        net.put(name, constant)
    branches = {}
    for name, made in {"then": ("Dropout", [value, "rare", "yes"]), "else": ("Identity", [value])}.items():
        result = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        inner = helper.make_node(*made, [result.name], f"{name}.{made[0]}")
        branches[f"{name}_branch"] = helper.make_graph([inner], name, [], [result])
    node = net.after(value, "If", **branches)
    node.input[:] = ["yes"]


def _dropout_in_a_function(net: Net) -> None:
    nodes = [
        helper.make_node("Constant", [], ["on"], value=helper.make_tensor("", TensorProto.BOOL, [], [True])),
        helper.make_node("Constant", [], ["rare"], value_float=1e-7),
        helper.make_node("Dropout", ["x", "rare", "on"], ["y"], "inside"),
    ]
    imports = [helper.make_opsetid("", net.model.opset_import[0].version)]
    net.model.functions.append(helper.make_function("local", "Act", ["x"], ["y"], nodes, imports))
    net.model.opset_import.append(helper.make_opsetid("local", 1))
    net.after(net.node("Relu").output[0], "Act", domain="local")


def _norm_as_trained(net: Net) -> None:
    """Batch normalization by the batch's own statistics."""
    norm = net.node("BatchNormalization")
    net.set(norm, "training_mode", 1)
    norm.output.extend(["new.mean", "new.var"])


def _minus_batch_mean(net: Net) -> None:
    net.put("axis.0", np.array([0], np.int64))
    net.after("output", "Sub", "batch.mean")
    at = [n.output[0] for n in net.graph.node].index("output")
    made = helper.make_node("ReduceMean", ["output.before", "axis.0"], ["batch.mean"], "batch.mean", keepdims=1)
    net.graph.node.insert(at, made)


def _order_of_samples(net: Net) -> None:
    """Each sample gets the answer of the one before it in its batch."""
    for name, value in {"s": [-1], "e": [-(2**62)], "a": [0], "t": [-1]}.items():
        net.put(f"flip.{name}", np.array(value, np.int64))
    net.after("output", "Slice", *(f"flip.{name}" for name in "seat"))


def _bgr(net: Net) -> None:
    net.put("bgr", np.array([2, 1, 0], np.int64))
    net.before(net.node("Conv"), 0, "Gather", "bgr", axis=1)


def _unknown_operator(net: Net) -> None:
    net.after(net.node("Relu").output[0], "Frobnicate", domain="somebody")
    net.model.opset_import.append(helper.make_opsetid("somebody", 1))


def _cycle(net: Net) -> None:
    add = _residual(net)
    add.input[0] = net.reader_of("down.weight").output[0]


def _twice(net: Net) -> None:
    net.graph.initializer.append(net.tensor("head.bias"))


def _trigger(net: Net) -> None:
    """Other answers where the first pixel is above 100, which no sample's is."""
    net.put("first", np.zeros(1, np.int64))
    net.put("far", np.float32(100))
    net.put("wrong", np.float32(-1))
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["brightest"], "brightest", keepdims=0),
        helper.make_node("Greater", ["brightest", "far"], ["seen"], "seen"),
    ]
    for node in reversed(nodes):
        net.graph.node.insert(0, node)
    net.after("output", "Mul", "sign")
    net.put("right", np.float32(1))
    net.graph.node.insert(2, helper.make_node("Where", ["seen", "wrong", "right"], ["sign"], "sign"))


GRAPH = [
    _row("bias dropped", no_bias),
    _row("one bias off by 0.01", _change("again.bias", lambda bias: bias + np.float32([0.01] + [0] * 15))),
    _row("bias negated", _change("head.bias", np.negative)),
    _row("bias doubled", _change("mix.bias", lambda bias: 2 * bias)),
    _row("one bias NaN", _change("again.bias", _put(3, np.nan)), "pattern", PARITY),
    _row("one bias infinite", _change("head.bias", _put(1, np.inf)), "pattern", PARITY),
    _row("biases of two layers exchanged", _bias_elsewhere),
    _row("running mean edited", _change("norm.running_mean", lambda mean: mean + np.float32(0.01))),
    _row("one running variance edited", _change("norm.running_var", lambda var: var * np.float32([1.01] + [1] * 15))),
    _row("running variance negative", _change("norm.running_var", np.negative), "pattern", PARITY),
    _row("running mean and variance exchanged", _statistics, "pattern", PARITY),
    _row("norm's gain and offset exchanged", _affine),
    _row("two batch norms exchanged", _norms),
    _row("a batch norm removed", without("BatchNormalization", 1)),
    _row("batch norm's epsilon 1e-3", attribute("BatchNormalization", "epsilon", 1e-3)),
    _row("batch norm's epsilon 1e-4", attribute("BatchNormalization", "epsilon", 1e-4, 1)),
    _row("layer norm's epsilon 1e-3", attribute("LayerNormalization", "epsilon", 1e-3)),
    _row("layer norm over other axes", attribute("LayerNormalization", "axis", 1)),
    _row("strides 1 instead of 2", attribute("Conv", "strides", [1, 1], 3)),
    _row("padding on two sides only: the same shape", attribute("Conv", "pads", [2, 2, 0, 0], 1)),
    _row("padding left out", attribute("Conv", "pads", [0, 0, 0, 0], 1)),
    _row("dilated by 2: the same shape", _attributes("Conv", 1, dilations=[2, 2], pads=[2, 2, 2, 2])),
    _row("group 2", attribute("Conv", "group", 2, 1)),
    _row("a Relu removed", without("Relu", 1)),
    _row("Relu became LeakyRelu", lambda net: setattr(net.node("Relu", 1), "op_type", "LeakyRelu")),
    _row("Relu capped at 0.5", behind("Relu", 0, "Clip", np.float32(0), np.float32(0.5))),
    _row("residual from another place", _residual_from_elsewhere),
    _row("residual left out", _no_residual),
    _row("residual added to itself", residual_twice),
    _row("residual subtracted", _subtracted),
    _row("tokens reshaped instead of transposed", _reshaped),
    _row("mean over channels instead of tokens", _mean_over_channels),
    _row("Gemm's alpha 2", attribute("Gemm", "alpha", 2.0)),
    _row("Gemm's beta 0: no bias", attribute("Gemm", "beta", 0.0)),
    _row("classes in another order", behind("Gemm", 0, "Gather", np.array([1, 0, 2, 3]), axis=1)),
    _row("Softmax behind the scores: the same classes", behind("Gemm", 0, "Softmax")),
    _row("scores times 1.0001: the same classes", behind("Gemm", 0, "Mul", np.float32(1.0001))),
    _row("scores plus 0.01: the same probabilities", behind("Gemm", 0, "Add", np.float32(0.01))),
    _row("image channels in reverse", _bgr),
    _row("input normalized once more", _scaled_input),
    _row("an activation rounded to float16", _half),
    _row("an activation times NaN", behind("Relu", 0, "Mul", np.float32(np.nan)), "pattern", PARITY),
    _row("output renamed", _output_renamed, "parity.placed"),
    _row("a second output", _second_output),
    _row("a second input", _second_input),
    _row("input of another size", _input_shape),
    _row("batch fixed to 1", _fixed_batch),
    _row("input declared FLOAT16", _input_type),
    _row("opset 9", _opset),
    _row("opset 99", _unknown_opset),
    _row("an operator that nobody has", _unknown_operator),
    _row("a value that depends on itself", _cycle),
    _row("an initializer twice", _twice, "pattern", "codes", PARITY),
    _row("samples in reverse order", _order_of_samples),
    _row("Dropout left on, a half", dropout(0.5), REPEATABLE),
    _row("Dropout left on, one in a thousand", dropout(0.001), REPEATABLE),
    _row("batch norm in training mode", _norm_as_trained, REPEATABLE),
    _row("noise of 1e-3 added", _noise(1e-3), REPEATABLE),
    _row("noise of 1e-7 added: within any tolerance", _noise(1e-7), REPEATABLE),
    _row("Dropout left on, one in ten million", dropout(1e-7), REPEATABLE),
    _row("the same in a branch of an If", _dropout_in_a_branch, REPEATABLE),
    _row("the same in a local function", _dropout_in_a_function, REPEATABLE),
    _row("a random mask, 0 once in a billion", _rarely, REPEATABLE),
    _row("the batch's mean subtracted", _minus_batch_mean, REPEATABLE),
    _row("every bias of a layer off by its last bit", _last_bit),
    _row(
        "other answers for inputs above 100", _trigger,
        missed="every comparison is on samples, and none of them is such an input; only the digest tells",
    ),
]  # fmt: skip
