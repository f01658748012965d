"""Correct ways to write model.onnx: other names, another order, another graph for the same function."""

from __future__ import annotations

import numpy as np
from graph_mutations import dropout
from mutation import Variant
from onnx import TensorProto, helper
from onnx_edits import MODEL, Edit, Net, edited


def _row(kind: str, edit: Edit, subject: str = "float") -> Variant:
    return Variant(kind, "model.onnx", edited(MODEL, edit), subject)


def _renamed_nodes(net: Net) -> None:
    for index, node in enumerate(net.graph.node):
        node.name = f"n{index}"


def _unnamed_nodes(net: Net) -> None:
    for node in net.graph.node:
        node.name = ""


def renamed_values(net: Net) -> None:
    kept = {value.name for value in (*net.graph.input, *net.graph.output, *net.graph.initializer)}
    kept |= {name.removesuffix(".codes") for name in kept}
    for node in list(net.graph.node):
        for index, name in enumerate(node.output):
            if name not in kept:
                net.redirect(name, f"value.{name}")
                node.output[index] = f"value.{name}"
    for value in net.graph.value_info:
        value.name = value.name if value.name in kept else f"value.{value.name}"


def _renamed_constants(net: Net) -> None:
    """Biases and statistics under other names; coded weights are known by theirs."""
    for tensor in net.graph.initializer:
        if not tensor.name.endswith((".codes", ".scale", ".zero_point")):
            net.redirect(tensor.name, f"c.{tensor.name}")
            tensor.name = f"c.{tensor.name}"


def _initializers_reversed(net: Net) -> None:
    tensors = list(net.graph.initializer)[::-1]
    del net.graph.initializer[:]
    net.graph.initializer.extend(tensors)


def _other_order(net: Net) -> None:
    """Each DequantizeLinear right before what reads it, instead of all at the start."""
    nodes = list(net.graph.node)
    moved = [node for node in nodes if node.op_type == "DequantizeLinear"]
    order = []
    for node in (node for node in nodes if node not in moved):
        order += [one for one in moved if one.output[0] in node.input]
        order.append(node)
    del net.graph.node[:]
    net.graph.node.extend(order)


def _notes(net: Net) -> None:
    net.model.doc_string, net.graph.doc_string, net.graph.name = "a note", "another", "renamed"
    net.model.producer_name, net.model.producer_version, net.model.model_version = "somebody", "9", 3
    net.model.metadata_props.add(key="owner", value="us")
    for node in net.graph.node:
        node.doc_string = "what it does"


def _ir_version(net: Net) -> None:
    net.model.ir_version = 11


def _no_shapes(net: Net) -> None:
    del net.graph.value_info[:]


def _batch_renamed(net: Net) -> None:
    for value in (*net.graph.input, *net.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"


def _batch_unnamed(net: Net) -> None:
    for value in (*net.graph.input, *net.graph.output):
        value.type.tensor_type.shape.dim[0].ClearField("dim_param")


def identities(net: Net) -> None:
    for op in ("Relu", "Conv", "Add"):
        net.after(net.node(op).output[0], "Identity")


def _identity_before_weight(net: Net) -> None:
    net.before(net.reader_of("conv.weight"), 1, "Identity")


def _dead(net: Net) -> None:
    net.graph.node.append(helper.make_node("Relu", [net.node("Relu").output[0]], ["nobody.reads.this"], "dead"))
    net.put("nobody.reads.that", np.float32(3))


def _transposed_twice(net: Net) -> None:
    value = net.node("Relu").output[0]
    net.after(value, "Transpose", perm=[0, 2, 3, 1])
    net.after(f"{value}.after", "Transpose", perm=[0, 3, 1, 2])


def _weight_stored_transposed(net: Net) -> None:
    """The codes in the other layout, turned back before they are dequantized."""
    net.change("mix.weight.codes", np.transpose)
    net.before(net.named("mix.weight.dq"), 0, "Transpose", perm=[1, 0])


def _conv_weight_turned(net: Net) -> None:
    net.change("conv.weight.codes", lambda codes: codes.transpose(1, 0, 2, 3))
    net.set(net.named("conv.weight.dq"), "axis", 1)
    net.before(net.reader_of("conv.weight"), 1, "Transpose", perm=[1, 0, 2, 3])


def _weight_reshaped(net: Net) -> None:
    shape = net.array("head.weight.codes").shape
    net.change("head.weight.codes", lambda codes: codes.ravel())
    net.put("whole.shape", np.array(shape, np.int64))
    net.before(net.named("head.weight.dq"), 0, "Reshape", "whole.shape")


def _constants_as_nodes(net: Net) -> None:
    for tensor in list(net.graph.initializer):
        net.graph.node.insert(
            0, helper.make_node("Constant", [], [tensor.name], f"{tensor.name}.constant", value=tensor)
        )
    del net.graph.initializer[:]


def _initializers_as_inputs(net: Net) -> None:
    """As old exporters had it: each initializer is also an input with a default."""
    for tensor in net.graph.initializer:
        net.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def _wide_container(net: Net) -> None:
    for layer in ("conv.weight", "again.weight", "down.weight", "mix.weight"):
        codes = net.array(f"{layer}.codes")
        net.graph.initializer.remove(net.tensor(f"{layer}.codes"))
        net.put(f"{layer}.codes", codes)


def _narrow_container(net: Net) -> None:
    for layer in ("conv.weight", "again.weight"):
        net.put(f"{layer}.narrow", net.array(f"{layer}.codes"))
        tensor = net.tensor(f"{layer}.codes")
        codes = net.array(f"{layer}.codes").ravel().tolist()
        tensor.CopyFrom(helper.make_tensor(f"{layer}.codes", TensorProto.INT4, tensor.dims, codes))
        net.graph.initializer.remove(net.tensor(f"{layer}.narrow"))


def _codes_as_integers(net: Net) -> None:
    """Codes in int32_data instead of raw bytes, as onnx.helper writes them."""
    tensor = net.tensor("head.weight.codes")
    codes = net.array("head.weight.codes")
    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.INT8, codes.shape, codes.ravel().tolist()))


def _zero_points(net: Net) -> None:
    """Zero points of 0 spelt out."""
    for layer, kind in (("conv.weight", TensorProto.INT4), ("head.weight", TensorProto.INT8)):
        count = net.array(f"{layer}.scale").size
        net.graph.initializer.append(helper.make_tensor(f"{layer}.zero", kind, [count], [0] * count))
        net.named(f"{layer}.dq").input.append(f"{layer}.zero")


def _blocks(net: Net) -> None:
    """The channel's scale repeated for each block of 16 input channels."""
    net.set(net.named("mix.weight.dq"), "block_size", 16)
    net.set(net.named("mix.weight.dq"), "axis", 1)
    net.change("mix.weight.scale", lambda scale: np.stack([scale, scale], 1))


def _negative_axis(net: Net) -> None:
    net.set(net.named("conv.weight.dq"), "axis", -4)


def _gemm(net: Net) -> None:
    """The last layer as MatMul and Add."""
    gemm = net.node("Gemm")
    x, weight, bias = gemm.input
    nodes = [
        helper.make_node("Transpose", [weight], ["head.turned"], "head.turn", perm=[1, 0]),
        helper.make_node("MatMul", [x, "head.turned"], ["head.product"], "head.product"),
        helper.make_node("Add", ["head.product", bias], [gemm.output[0]], "head.sum"),
    ]
    net.graph.node.remove(gemm)
    net.graph.node.extend(nodes)


def _gemm_turned(net: Net) -> None:
    """Gemm without transB: the Transpose is a node."""
    gemm = net.node("Gemm")
    net.set(gemm, "transB", 0)
    net.before(gemm, 1, "Transpose", perm=[1, 0])


def _bias_behind(net: Net) -> None:
    """A convolution's bias as an Add of its own."""
    conv = net.reader_of("again.weight")
    net.change("again.bias", lambda bias: bias.reshape(1, -1, 1, 1))
    name = conv.input[2]
    del conv.input[2:]
    net.after(conv.output[0], "Add", name)


def _flattened(net: Net) -> None:
    """Relu as Max with 0."""
    relu = net.node("Relu")
    net.put("nothing", np.float32(0))
    relu.op_type = "Max"
    relu.input.append("nothing")


def _norm_as_products(net: Net) -> None:
    """A batch norm folded into one product and one sum."""
    norm = net.node("BatchNormalization", 1)
    gain, offset, mean, variance = (net.array(name).astype(np.float64) for name in norm.input[1:5])
    factor = gain / np.sqrt(variance + 1e-5)
    net.put("norm.factor", factor.astype(np.float32).reshape(1, -1, 1, 1))
    net.put("norm.offset", (offset - mean * factor).astype(np.float32).reshape(1, -1, 1, 1))
    value, result = norm.input[0], norm.output[0]
    at = list(net.graph.node).index(norm)
    net.graph.node.remove(norm)
    net.graph.node.insert(at, helper.make_node("Mul", [value, "norm.factor"], ["norm.scaled"], "norm.mul"))
    net.graph.node.insert(at + 1, helper.make_node("Add", ["norm.scaled", "norm.offset"], [result], "norm.add"))


def _dropout_off(net: Net) -> None:
    net.after(net.node("Relu").output[0], "Dropout")


def _dead_dropout(net: Net) -> None:
    net.graph.node.append(helper.make_node("RandomNormalLike", [net.node("Relu").output[0]], ["unread"], "unread"))
    net.put("half", np.float32(0.5))
    net.put("yes", np.array(True))
    net.graph.node.append(helper.make_node("Dropout", ["unread", "half", "yes"], ["unread.too"], "unread.too"))


def _double(net: Net) -> None:
    """One activation through float64 and back: no digit is lost."""
    value = net.node("Relu").output[0]
    net.after(value, "Cast", to=TensorProto.DOUBLE)
    net.after(f"{value}.after", "Cast", to=TensorProto.FLOAT)


GRAPH_VARIANTS = [
    _row("nodes renamed", _renamed_nodes),
    _row("nodes without names", _unnamed_nodes),
    _row("values renamed", renamed_values),
    _row("biases and statistics renamed", _renamed_constants),
    _row("initializers in reverse order", _initializers_reversed),
    _row("nodes in another order that holds", _other_order),
    _row("notes, producer and metadata", _notes),
    _row("ir_version 11", _ir_version),
    _row("no inner shapes", _no_shapes),
    _row("batch axis of another name", _batch_renamed),
    _row("batch axis without a name", _batch_unnamed),
    _row("Identity behind operators", identities),
    _row("Identity between a weight and its operator", _identity_before_weight),
    _row("a dead node and a dead constant", _dead),
    _row("an activation transposed and back", _transposed_twice),
    _row("a matrix stored transposed, turned as codes", _weight_stored_transposed),
    _row("a convolution's weight stored turned", _conv_weight_turned, "unbuilt"),
    _row("a weight stored flat", _weight_reshaped),
    _row("Constant nodes instead of initializers", _constants_as_nodes),
    _row("initializers listed as inputs too", _initializers_as_inputs),
    _row("4-bit codes in an INT8 container", _wide_container, "unbuilt"),
    _row("4-bit codes in an INT4 container", _narrow_container, "unbuilt int8"),
    _row("codes in int32_data", _codes_as_integers),
    _row("zero points of 0 spelt out", _zero_points),
    _row("the channel's scale repeated in blocks", _blocks, "unbuilt"),
    _row("a negative axis", _negative_axis),
    _row("Gemm as Transpose, MatMul, Add", _gemm),
    _row("Gemm without transB", _gemm_turned, "unbuilt"),
    _row("a convolution's bias as an Add", _bias_behind),
    _row("Relu as Max with 0", _flattened),
    _row("a batch norm as Mul and Add", _norm_as_products),
    _row("Dropout that is off", _dropout_off),
    _row("Dropout that is off by an input", dropout(0.5, on=False)),
    _row("Dropout that is on and drops nothing", dropout(0.0)),
    _row("a dead Dropout that is on, and dead noise", _dead_dropout),
    _row("an activation through float64", _double),
    _row("values renamed, activations quantized", renamed_values, "unbuilt int8"),
    _row("initializers in reverse order, activations quantized", _initializers_reversed, "int8"),
]
