"""An ONNX model, edited in a line or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from mutation import Corrupt, Subject
from onnx import NodeProto, TensorProto, helper, numpy_helper
from weight_kinds import Coded, WeightKind

MODEL, PLACED = "export/model.onnx", "build/a100/placed.onnx"
INT4 = ml_dtypes.int4


class Net:
    """A model that is edited in place; values are called by their ONNX names."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.graph = model.graph

    def tensor(self, name: str) -> TensorProto:
        return next(tensor for tensor in self.graph.initializer if tensor.name == name)

    def array(self, name: str) -> Any:
        """A copy of an initializer; 4-bit codes as int8."""
        array = numpy_helper.to_array(self.tensor(name)).copy()
        return array.astype(np.int8) if array.dtype == INT4 else array

    def put(self, name: str, array: Any) -> None:
        """Replace an initializer, or add one; int8 goes into INT4 where that was its type."""
        array = np.asarray(array)
        there = [tensor for tensor in self.graph.initializer if tensor.name == name]
        if there and there[0].data_type == TensorProto.INT4 and array.dtype == np.int8:
            array = array.astype(INT4)
        made = numpy_helper.from_array(np.array(array, order="C"), name)
        if there:
            there[0].CopyFrom(made)
        else:
            self.graph.initializer.append(made)

    def change(self, name: str, edit: Callable[[Any], Any]) -> None:
        """Edit an initializer in place, or replace it by what `edit` returns."""
        array = self.array(name)
        edited = edit(array)
        self.put(name, array if edited is None else edited)

    def coded(self, layer: str) -> Coded:
        return Coded(self.array(f"{layer}.codes"), self.array(f"{layer}.scale"))

    def put_coded(self, layer: str, coded: Coded) -> None:
        self.put(f"{layer}.codes", coded.codes)
        self.put(f"{layer}.scale", coded.scale)

    def node(self, op: str, index: int = 0) -> NodeProto:
        """The index-th node of an operator, in the file's order."""
        return [node for node in self.graph.node if node.op_type == op][index]

    def named(self, name: str) -> NodeProto:
        return next(node for node in self.graph.node if node.name == name)

    def reader_of(self, layer: str) -> NodeProto:
        """The Conv, MatMul or Gemm that multiplies with a weight, seen through a Transpose."""
        names = {layer}
        for node in self.graph.node:
            if node.op_type in ("Transpose", "Identity", "Cast") and node.input[0] in names:
                names.add(node.output[0])
        return next(n for n in self.graph.node if n.op_type in ("Conv", "MatMul", "Gemm") and names & set(n.input))

    def set(self, node: NodeProto, name: str, value: Any) -> None:
        """Set an attribute; None takes it away."""
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(helper.make_attribute(name, value))

    def remove(self, node: NodeProto) -> None:
        """Take a node away: what read it reads its first input."""
        self.redirect(node.output[0], node.input[0])
        self.graph.node.remove(node)

    def redirect(self, old: str, new: str) -> None:
        """Let every reader of a value read another one."""
        for node in self.graph.node:
            for index, name in enumerate(node.input):
                if name == old:
                    node.input[index] = new

    def after(
        self, value: str, op: str, *more: str, outputs: tuple[str, ...] = (), domain: str = "", **given: Any
    ) -> NodeProto:
        """Put a node behind a value: every reader, or the graph's output, gets what it makes.

        Args:
            value: What it reads first.
            op: Its operator.
            more: Names of its further inputs.
            outputs: Further outputs.
            domain: The operator's.
            given: Attributes.
        """
        at = next((i for i, node in enumerate(self.graph.node) if value in node.output), -1)
        if value in {output.name for output in self.graph.output}:
            maker = self.graph.node[at]
            source, result = f"{value}.before", value
            maker.output[list(maker.output).index(value)] = source
        else:
            source, result = value, f"{value}.after"
            self.redirect(value, result)
        node = helper.make_node(op, [source, *more], [result, *outputs], f"{result}.{op}", domain=domain, **given)
        self.graph.node.insert(at + 1, node)
        return self.graph.node[at + 1]

    def before(self, node: NodeProto, index: int, op: str, *more: str, **given: Any) -> NodeProto:
        """Put a node before one input of another."""
        at = list(self.graph.node).index(node)
        result = f"{node.input[index]}.for.{node.output[0]}"
        made = helper.make_node(op, [node.input[index], *more], [result], f"{result}.{op}", **given)
        node.input[index] = result
        self.graph.node.insert(at, made)
        return self.graph.node[at]


Edit = Callable[[Net], None]


def edited(file: str, edit: Edit) -> Corrupt:
    """Return what edits one ONNX file of a run."""

    def corrupt(subject: Subject) -> None:
        rewrite(subject.file(file), edit)

    return corrupt


def rewrite(path: Path, edit: Edit) -> None:
    net = Net(onnx.load(path, load_external_data=False))
    edit(net)
    path.write_bytes(net.model.SerializeToString())


def with_weight(kind: WeightKind) -> Edit:
    """Return what does a corruption of weights to a model."""
    return lambda net: net.put_coded(kind.layer, kind.change(net.coded(kind.layer)))
