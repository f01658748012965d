"""Makes weights graph inputs, so that no optimization can fold, rename, merge or transpose them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ModelError

Array = npt.NDArray[Any]


class HoldWeights(ir.passes.InPlacePass):
    """Turns the layers' weight initializers into graph inputs and keeps their values in `held`.

    The optimizer would fold a batch norm into a constant weight and transpose a constant matrix; what is in the file
    would then no longer be codes x scale, under the same name.

    Args:
        codes: Weight name -> what the trained layer multiplies with; each must be an initializer of the graph.
        names: All layer weights, in the model's order; one without codes is held if only layers multiply with it.
    """

    def __init__(self, codes: Mapping[str, CodedTensor], names: Sequence[str]) -> None:
        self.held: dict[str, Array] = {}
        self._codes = codes
        self._names = names

    def requires(self, model: ir.Model) -> None:
        """Each coded weight is one float initializer that only layers use, and equals codes x scale bit for bit."""
        for name, tensor in self._codes.items():
            value = model.graph.initializers.get(name)
            if value is None or value.const_value is None:
                raise _error(name, "torch.onnx.export left no initializer of that name (tied, folded or unused?)")
            if not consumers(value):
                users = ", ".join(f"{use.node.op_type} '{use.node.name}'" for use in value.uses()) or "nothing"
                needed = "Convs, or MatMuls and Gemms, must multiply with it, all along one axis"
                raise _error(name, f"{needed}, and it is used by {users}")
            trained, exported = np.asarray(tensor.dequantize()), value.const_value.numpy()
            if exported.shape != trained.shape or exported.dtype != np.float32:
                raise _error(name, f"it is {exported.dtype} {exported.shape} in ONNX and {trained.shape} in the codes")
            different = np.count_nonzero(exported.view(np.uint32) != trained.view(np.uint32))
            if different:
                raise _error(name, f"{different} of {trained.size} exported values differ from codes x scale")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Move values out of the initializers."""
        graph = model.graph
        for name in self._names:
            value = graph.initializers.get(name)
            if value is None or value.const_value is None or not consumers(value):
                continue  # only a weight without codes may be used in another way: it stays as it is
            self.held[name] = value.const_value.numpy().copy()
            graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
        return ir.passes.PassResult(model, modified=bool(self.held))

    def ensures(self, model: ir.Model) -> None:
        """Every held weight is an input and no initializer."""
        inputs = {value.name for value in model.graph.inputs}
        for name in self.held:
            if name not in inputs or name in model.graph.initializers:
                raise ir.passes.PostconditionError(f"'{name}' is not held")


def consumers(value: ir.Value) -> list[ir.Node]:
    """Return every Conv, ConvTranspose, Gemm or MatMul that multiplies with a value, also past a Transpose.

    Several layers may share a weight, such as a detector's head over all levels, or a tied linear layer. The list is
    empty if anything else uses the value, or if two users sum over different axes of it: one n:m pattern cannot hold
    for both.
    """
    found: list[tuple[ir.Node, tuple[str, int]]] = []
    # torch asks for the shape of a convolution's weight to make a bias of zeros; folding settles that.
    for use in (use for use in value.uses() if use.node.op_type != "Shape"):
        if use.node.op_type == "Transpose" and use.node.domain == "":
            turned = use.node.outputs[0]
            if not turned.uses() or turned.is_graph_output():
                return []
            ways = [(one.node, _way(one.node, one.idx, turned=True)) for one in turned.uses()]
        else:
            ways = [(use.node, _way(use.node, use.idx, turned=False))]
        for node, way in ways:
            if way is None:
                return []
            found.append((node, way))
    same = len({way for _, way in found}) == 1 and not value.is_graph_output()
    return [node for node, _ in found] if same else []


def _way(node: ir.Node, index: int, turned: bool) -> tuple[str, int] | None:
    """Return the kind of product and the stored axis that it sums over; None if this is no layer's weight."""
    if node.domain != "" or index != 1:
        return None
    if node.op_type == "MatMul":
        return "matrix", int(turned)  # ..., M, K  @  K, N
    if turned:
        return None
    if node.op_type == "Gemm":
        return "matrix", node.attributes.get_int("transB", 0)
    return {"Conv": ("Conv", 1), "ConvTranspose": ("ConvTranspose", 0)}.get(node.op_type)


def _error(name: str, problem: str) -> ModelError:
    layer = name.removesuffix(".weight")
    return ModelError(
        f"The weight of layer '{layer}' cannot be exported as codes: {problem}.",
        f"Leave the layer in float with compression.overrides: {{'{layer}': off}}, and train again.",
    )
