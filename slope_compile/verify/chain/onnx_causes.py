"""Why an ONNX file answers differently to the same input: its nodes that were left in training mode, or that draw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_FLAG_OR_AXES = 8  # elements; larger constants are neither


@dataclass
class OnnxCauses:
    """Nodes in words.

    Args:
        draws: Draw random numbers.
        batch: Normalize with the batch's own statistics.
        mixes: Quantize with the batch's range, or reduce over the first axis, as a batch norm without running
            statistics does: sound files may do both.
    """

    draws: list[str] = field(default_factory=list)
    batch: list[str] = field(default_factory=list)
    mixes: list[str] = field(default_factory=list)


def onnx_causes(model: onnx.ModelProto) -> OnnxCauses:
    """Look through all nodes of a file."""
    found = OnnxCauses()
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 0)
    constants = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer if _is_small(one)}
    for node in _nodes(model):
        name = f"node '{node.name or (node.output[0] if node.output else '?')}' ({node.op_type})"
        values = {one.name: one for one in node.attribute}
        in_training = opset < 7 and not ("is_test" in values and values["is_test"].i)  # before opset 7 by default
        if node.op_type == "Constant" and node.output and "value" in values and _is_small(values["value"].t):
            constants[node.output[0]] = numpy_helper.to_array(values["value"].t)
        elif node.op_type in _RANDOM:
            found.draws.append(f"{name} draws random numbers")
        elif node.op_type == "Dropout":
            asked = node.input[2] if len(node.input) > 2 else ""
            mode = constants.get(asked)
            if asked and mode is None:
                found.draws.append(f"{name} may be in training mode: '{asked}' is computed")
            elif in_training if mode is None else bool(np.any(mode)):
                found.draws.append(f"{name} is in training mode")
        elif node.op_type == "BatchNormalization":
            if values["training_mode"].i if "training_mode" in values else in_training:
                found.batch.append(f"{name} is in training mode: it takes the batch's own statistics")
        elif node.op_type == "DynamicQuantizeLinear":
            found.mixes.append(f"{name} takes its range from the whole batch")
        elif node.op_type.startswith("Reduce"):
            given = constants.get(node.input[1], ()) if len(node.input) > 1 else ()
            if 0 in (values["axes"].ints if "axes" in values else np.ravel(given)):
                found.mixes.append(f"{name} reduces over the batch")
    return found


def _is_small(tensor: onnx.TensorProto) -> bool:
    return not tensor.external_data and int(np.prod(tensor.dims, dtype=np.int64)) <= _FLAG_OR_AXES


def _nodes(model: onnx.ModelProto) -> Iterator[NodeProto]:
    """Yield all nodes of a file, those of subgraphs and functions too; constants come before what reads them."""
    waiting = [*reversed(model.graph.node), *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            inner = [*attribute.g.node, *(one for graph in attribute.graphs for one in graph.node)]
            waiting += reversed(inner)
