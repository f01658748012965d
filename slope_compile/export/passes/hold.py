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
        names: All layer weights, in the model's order; one without codes is held if it is an initializer of one layer.
    """

    def __init__(self, codes: Mapping[str, CodedTensor], names: Sequence[str]) -> None:
        self.held: dict[str, Array] = {}
        self._codes = codes
        self._names = names

    def requires(self, model: ir.Model) -> None:
        """Each coded weight is one float initializer, used by one layer only, and equals codes x scale bit for bit."""
        for name, tensor in self._codes.items():
            value = model.graph.initializers.get(name)
            if value is None or value.const_value is None:
                raise _error(name, "torch.onnx.export left no initializer of that name (tied, folded or unused?)")
            if consumer(value) is None:
                users = ", ".join(f"{use.node.op_type} '{use.node.name}'" for use in value.uses()) or "nothing"
                raise _error(name, f"one Conv, MatMul or Gemm must multiply with it, and it is used by {users}")
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
            if value is None or value.const_value is None or consumer(value) is None:
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


def consumer(value: ir.Value) -> ir.Node | None:
    """Return the Conv, ConvTranspose, Gemm or MatMul that alone multiplies with a value, also past one Transpose."""
    # torch asks for the shape of a convolution's weight to make a bias of zeros; folding settles that.
    uses = [use for use in value.uses() if use.node.op_type != "Shape"]
    if len(uses) != 1 or value.is_graph_output():
        return None
    use = uses[0]
    if use.node.op_type == "Transpose" and use.node.domain == "":
        inner = tuple(use.node.outputs[0].uses())
        if len(inner) != 1 or inner[0].node.op_type != "MatMul":
            return None
        use = inner[0]
    layer = use.node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and use.node.domain == ""
    return use.node if layer and use.idx == 1 else None


def _error(name: str, problem: str) -> ModelError:
    layer = name.removesuffix(".weight")
    return ModelError(
        f"The weight of layer '{layer}' cannot be exported as codes: {problem}.",
        f"Leave the layer in float with compression.overrides: {{'{layer}': off}}, and train again.",
    )
