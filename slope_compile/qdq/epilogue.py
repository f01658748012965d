"""What a kernel does with its result on the way out, and whether what leaves it is INT8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from onnx import NodeProto

from slope_compile.qdq.graph import MOVES, Scope, is_standard

# What TensorRT computes in the kernel of the product before it: norm, bias, residual, activation function; x·sigmoid(x)
# is two nodes.
EPILOGUE = (
    "BatchNormalization", "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "HardSigmoid", "HardSwish", "Gelu",
    "Tanh", "Add", "Mul",
)  # fmt: skip
_FOLLOWED = 64  # values behind a layer that are looked at

Readers = Mapping[tuple[int, str], list[tuple[Scope, NodeProto]]]


def readers(scopes: Iterable[Scope]) -> Readers:
    """Return who reads each value: the id of the scope that defines it and its name there -> the nodes.

    Args:
        scopes: All of a model; they must outlive the answer.

    Raises:
        ArtifactError: If names are nested too deeply.
    """
    found: dict[tuple[int, str], list[tuple[Scope, NodeProto]]] = {}
    for scope in scopes:
        for node in scope.nodes:
            for name in filter(None, node.input):
                where, defined, _ = scope.find(name)
                found.setdefault((id(where), defined), []).append((scope, node))
    return found


def leaves_as_int8(scope: Scope, name: str, users: Readers) -> bool:
    """Return whether all that reads a value, through an epilogue or what only moves values, is a QuantizeLinear.

    Args:
        scope: Where the value is made.
        name: Its name there.
        users: Of the whole model.
    """
    pending = [(scope, name)]
    seen = {(id(scope), name)}
    for _ in range(_FOLLOWED):
        if not pending:
            return True
        where, value = pending.pop()
        found = users.get((id(where), value), [])
        if value in where.results or not found:
            return False
        for inner, node in found:
            if is_standard(node, "QuantizeLinear"):
                continue
            if not node.output or not any(is_standard(node, op) for op in (*EPILOGUE, *MOVES, "MaxPool")):
                return False
            made = inner, node.output[0]
            if (id(inner), made[1]) not in seen:
                seen.add((id(inner), made[1]))
                pending.append(made)
    return False
