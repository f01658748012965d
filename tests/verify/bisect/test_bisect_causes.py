"""A real export, broken in one way at a time: the right layer is named, and the right cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bisect_nets import Edit, Exported, change, consumer, producer, tensor
from onnx import TensorProto, helper, numpy_helper


def one(index: Any, of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def changed(array: Any) -> Any:
        array[index] = of(array[index])
        return array

    return changed


def swapped(a: int, b: int, axis: int) -> Callable[[Any], Any]:
    def changed(array: Any) -> Any:
        order = list(range(array.shape[axis]))
        order[a], order[b] = b, a
        return array.take(order, axis)

    return changed


def both(*edits: Edit) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for one_edit in edits:
            one_edit(model)

    return edit


def wrong_axis(model: onnx.ModelProto) -> None:
    producer(model, "conv2.weight").attribute[0].i = 1


def zero_point(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(helper.make_tensor("zero", TensorProto.INT4, [16], [0] * 15 + [1]))
    producer(model, "conv2.weight").input.append("zero")


def as_unsigned(model: onnx.ModelProto) -> None:
    tensor(model, "conv2.weight.codes").data_type = TensorProto.UINT4


def swap_nibbles(model: onnx.ModelProto) -> None:
    stored = tensor(model, "conv2.weight.codes")
    stored.raw_data = bytes((byte >> 4 | byte << 4) & 0xFF for byte in stored.raw_data)


def without_bias(model: onnx.ModelProto) -> None:
    add = producer(model, "linear")
    model.graph.node.remove(add)
    producer(model, "val_34").output[0] = "linear"


def half_scales(name: str, kind: int) -> Edit:
    """Round what a DequantizeLinear makes, on its way to the layer."""

    def edit(model: onnx.ModelProto) -> None:
        producer(model, name).output[0] = f"{name}.exact"
        index = list(model.graph.node).index(consumer(model, name))
        nodes = [
            helper.make_node("Cast", [f"{name}.exact"], [f"{name}.narrow"], to=kind),
            helper.make_node("Cast", [f"{name}.narrow"], [name], to=TensorProto.FLOAT),
        ]
        for node in reversed(nodes):
            model.graph.node.insert(index, node)

    return edit


def random_codes(array: Any) -> Any:
    return np.random.default_rng(5).integers(-7, 8, array.shape)


def noisy(array: Any) -> Any:
    """Each number off by up to 1 in 3000: as much as rounding to FP16 would change it, and no rounding."""
    return array * (1 + np.random.default_rng(1).uniform(-1, 1, array.shape) / 3000)


def attribute(op: str, name: str, value: Any) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == op)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return edit


WEIGHTS: dict[str, tuple[Edit, str, str]] = {
    "scale x 2": (change("conv2.weight.scale", lambda a: a * 2), "conv2", "off by a power of two: x 2, everywhere"),
    "scale / 8": (change("wide.weight.scale", lambda a: a / 8), "wide", "scale off by a power of two: x 0.125"),
    "scale of one channel": (
        change("conv2.weight.scale", one(3, lambda a: a * 4)), "conv2", "power of two: x 4, in output channel 3"
    ),
    "scale x 1.5": (change("proj.weight.scale", lambda a: a * 1.5), "proj", "scale off by a factor of 1.5"),
    "scales permuted": (change("conv2.weight.scale", lambda a: a[::-1]), "conv2", "scales differ in"),
    "sign": (change("conv1.weight.scale", lambda a: -a), "conv1", "sign flipped, everywhere"),
    "sign of a channel": (change("wide.weight.scale", one(7, lambda a: -a)), "wide", "flipped, in output channel 7"),
    "wrong axis": (wrong_axis, "conv2", "wrong axis: the scales run along axis 1 of the codes; along axis 0 they fit"),
    "transposed": (change("proj.weight.codes", lambda a: a.T), "proj", "transposed"),
    "transposed kernel": (
        change("conv2.weight.codes", lambda a: a.swapaxes(2, 3)), "conv2", "transposed: axes 2 and 3"
    ),
    "transposed bytes": (
        change("wide.weight.codes", lambda a: a.T.reshape(a.shape)), "wide", "as if axes 0 and 1 were exchanged"
    ),
    "mirrored": (change("conv1.weight.codes", lambda a: a[:, :, ::-1, ::-1]), "conv1", "turned by 180 degrees"),
    "output channels swapped": (
        both(change("conv2.weight.codes", swapped(2, 9, 0)), change("conv2.weight.scale", swapped(2, 9, 0))),
        "conv2", "output channels 2 and 9 are swapped",
    ),
    "codes of channels swapped": (
        change("conv2.weight.codes", swapped(2, 9, 0)), "conv2", "output channels 2 and 9 are swapped"
    ),
    "input channels swapped": (
        change("conv2.weight.codes", swapped(0, 5, 1)), "conv2", "input channels 0 and 5 are swapped"
    ),
    "channels permuted": (
        change("conv2.weight.codes", lambda a: np.roll(a, 1, 1)), "conv2", "input channels are permuted"
    ),
    "zero point": (zero_point, "conv2", "zero point not zero: 1 of 16"),
    "unsigned container": (as_unsigned, "conv2", "unsigned: negative codes are read as UINT4"),
    "negative codes clipped": (
        change("conv2.weight.codes", lambda a: np.maximum(a, 0)), "conv2", "unsigned: the negative codes are clipped"
    ),
    "nibbles swapped": (swap_nibbles, "conv2", "the nibbles of each byte"),
    "one code": (
        change("conv2.weight.codes", one((4, 1, 1, 1), lambda a: a ^ 1 or 1)), "conv2", "single codes differ: 1 of 2304"
    ),
    "mask": (
        change("conv2.weight.codes", lambda a: np.where(np.indices(a.shape)[0] == 3, np.where(a == 0, 1, a), a)),
        "conv2", "mask broken",
    ),
    "pruned again": (
        change("conv2.weight.codes", lambda a: np.where(np.abs(a) == 1, 0, a)), "conv2", "mask broken"
    ),
    "stale": (change("conv2.weight.codes", random_codes), "conv2", "stale: all"),
    "FP16": (half_scales("conv2.weight", TensorProto.FLOAT16), "conv2", "lower precision: the graph makes FLOAT16"),
    "FP16 scales": (
        change("conv2.weight.scale", lambda a: a.astype(np.float16)), "conv2", "lower precision, as FP16 is"
    ),
    "noise on the scales": (
        change("conv2.weight.scale", noisy), "conv2", "scales differ in 16 of 16 output channels, by factors of 0.999"
    ),
    "NaN scale": (
        change("conv2.weight.scale", one(1, lambda a: a * np.nan)), "conv2", "NaN or infinity in 1 of 16 scales"
    ),
    "all zeros": (change("conv2.weight.codes", lambda a: a * 0), "conv2", "all 0"),
    "bias missing": (without_bias, "proj", "bias missing"),
    "bias zero": (change("proj.bias", lambda a: a * 0), "proj", "another bias: all 0"),
    "bias of one channel": (change("head.bias", one(2, lambda a: a + 1)), "head", "single values differ: 1 of 5"),
    "bias rounded": (
        change("proj.bias", lambda a: a.astype(np.float16).astype(np.float32)), "proj", "lower precision, as FP16 is"
    ),
    "noise on a bias": (change("proj.bias", noisy), "proj", "another bias: all values differ, at a cosine of 1.0000"),
    "bias NaN": (change("head.bias", one(2, lambda a: a * np.nan)), "head", "another bias: NaN or infinity: 1 of 5"),
    "norm's variance": (change("bn2.running_var", lambda a: a * 4), "bn2", "another running_var: scale off by a power"),
    "norm's factor": (change("norm.weight", lambda a: a[::-1]), "norm", "weight: channels are permuted"),
    "norm's epsilon": (attribute("BatchNormalization", "epsilon", 0.5), "bn1", "epsilon 0.5, expected 1e-05"),
    "Gemm's factor": (attribute("Gemm", "alpha", 2.0), "head", "alpha 2.0, expected 1.0"),
    "Gemm's factor of the bias": (attribute("Gemm", "beta", 0.5), "head", "beta 0.5, expected 1.0"),
    "padding": (attribute("Conv", "pads", [0, 0, 0, 0]), "conv1", "pads [0, 0, 0, 0], expected [1, 1, 1, 1]"),
    "dilation": (
        both(attribute("Conv", "dilations", [2, 2]), attribute("Conv", "pads", [2, 2, 2, 2])), "conv1", "dilations"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_layer_and_the_cause_are_named(name: str, mini: Exported, tmp_path: Path) -> None:
    edit, layer, cause = WEIGHTS[name]
    found = mini.explain(tmp_path, edit)
    assert found is not None
    assert (found.layer, layer) == (layer, layer), str(found)
    assert cause in found.cause, found.cause
    assert found.error > found.allowed


@pytest.mark.parametrize("name", ["scale x 2", "wrong axis", "one code", "norm's variance", "bias missing", "stale"])
def test_two_files_are_told_apart_like_torch_and_a_file(name: str, mini: Exported, tmp_path: Path) -> None:
    edit, layer, cause = WEIGHTS[name]
    found = mini.between_files(tmp_path, edit)
    assert found is not None
    assert found.layer == layer, str(found)
    assert cause in found.cause, found.cause


def replace(value: str, op: str) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        producer(model, value).op_type = op

    return edit


def behind(value: str, op: str, inputs: list[str], tensors: dict[str, Any], **attributes: Any) -> Edit:
    """Insert a node behind the one that makes a value."""

    def edit(model: onnx.ModelProto) -> None:
        node = producer(model, value)
        node.output[0] = f"{value}.before"
        index = list(model.graph.node).index(node) + 1
        model.graph.node.insert(index, helper.make_node(op, [f"{value}.before", *inputs], [value], **attributes))
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), n) for n, v in tensors.items())

    return edit


BETWEEN: dict[str, tuple[Edit, str, str, str]] = {  # torch sees a span, another file the node
    "Relu gone": (
        replace("relu_1", "Identity"), "between bn2, the input of conv2 and the input of norm", "node_relu_1",
        "missing Relu",
    ),
    "sum with a factor": (
        behind("add_5", "Mul", ["half"], {"half": np.float32(0.5)}),
        "between bn2, the input of conv2 and the input of norm", "between bn2, relu and add_5",
        "scale off by a power of two: x 0.5",
    ),
    "clip": (
        behind("gelu", "Clip", ["", "top"], {"top": np.float32(0.25)}), "between proj and the input of wide",
        "between proj and gelu", "clipped to",
    ),
    "Gelu by the other formula": (
        attribute("Gelu", "approximate", "tanh"), "node_gelu", "node_gelu", "Gelu's approximate is",
    ),
    "mean of another axis": (change("val_39", lambda a: a + 1), "node_mean", "node_mean", "], expected [1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEEN)
def test_what_lies_between_layers_is_found_too(name: str, mini: Exported, tmp_path: Path) -> None:
    edit, span, node, cause = BETWEEN[name]
    found = mini.explain(tmp_path, edit)
    assert found is not None
    assert found.layer == span, str(found)
    assert cause in found.cause, found.cause
    found = mini.between_files(tmp_path, edit)
    assert found is not None
    assert found.layer == node, str(found)
    assert cause in found.cause, found.cause


def unquantized(value: str) -> Edit:
    """Let what reads a dequantized value read what was quantized."""

    def edit(model: onnx.ModelProto) -> None:
        dequantize = producer(model, value)
        quantize = producer(model, dequantize.input[0])
        for node in model.graph.node:
            for index, name in enumerate(node.input):
                if name == value:
                    node.input[index] = quantize.input[0]
        model.graph.node.remove(dequantize)
        model.graph.node.remove(quantize)

    return edit


QUANTIZED: dict[str, tuple[Edit, str, str]] = {
    "step x 2": (change("conv2.input.scale", lambda a: a * 2), "conv2.input", "scale off by a power of two: x 2"),
    "step x 1.1": (change("wide.input.scale", lambda a: a * 1.1), "wide.input", "scale off by a factor of 1.1"),
    "unsigned": (change("conv1.input.min", lambda a: a * 0), "conv1.input", "unsigned clipped"),
    "lower top": (change("head.input.max", lambda a: a / 7), "head.input", "levels -8 to 1, expected -8 to 7"),
    "zero point": (change("proj.input.zero_point", lambda a: a + 3), "proj.input", "zero point not zero"),
    "quantizer missing": (unquantized("wide.input.dq.out"), "wide.input", "missing input quantizer: the reference"),
    "output quantizer missing": (
        unquantized("proj.output.dq.out"), "proj.output", "missing output quantizer: the reference quantizes here"
    ),
    "weight": (change("conv2.weight.scale", lambda a: a * 2), "conv2", "scale off by a power of two: x 2"),
    "bias": (change("proj.bias", lambda a: a * 0), "proj", "another bias: all 0"),
    "norm": (change("bn2.running_mean", lambda a: a + 1), "bn2", "another running_mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounding_of_activations_is_not_blamed(name: str, mini_int8: Exported, tmp_path: Path) -> None:
    edit, layer, cause = QUANTIZED[name]
    found = mini_int8.explain(tmp_path, edit)
    assert found is not None
    assert found.layer == layer, str(found)
    assert cause in found.cause, found.cause


def test_intact_files_have_no_divergence(mini: Exported, mini_int8: Exported, tmp_path: Path) -> None:
    for one_net in (mini, mini_int8):
        assert one_net.explain(tmp_path, lambda model: None) is None
        assert one_net.between_files(tmp_path, lambda model: None) is None


def test_the_causes_in_the_docs_are_those_that_are_told() -> None:
    root = Path(__file__).resolve().parents[3]
    text = (root / "docs/verify.md").read_text(encoding="utf-8")
    table = text.partition("| cause | what fits |")[2].partition("**The reproducer**")[0]
    rows = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    told = [words for row in rows for words in re.findall("`(.+?)`", row)]
    source = "".join(path.read_text(encoding="utf-8") for path in (root / "slope_compile/verify/bisect").glob("*.py"))
    expected = source + "".join(cause for _, _, cause in (*WEIGHTS.values(), *QUANTIZED.values()))
    assert len(told) > 20
    assert [words for words in told if words not in expected] == []
