"""Why an ONNX file may answer differently to the same input: nodes left in training mode, or that draw.

The file tells, whatever its answers show: noise below the tolerance is noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from slope_compile.verify.chain.live_nodes import LiveNode, live_nodes

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
_SILENT = 7  # the opset from which on Dropout and BatchNormalization are not in training mode by default
_DROPOUT_WITH_MODE = 12  # the opset from which on Dropout has inputs `ratio` and `training_mode`


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

    @property
    def faults(self) -> list[str]:
        """What no exported model may have."""
        return [*self.draws, *self.batch]


def onnx_causes(onnx: Path) -> OnnxCauses:
    """Look through the nodes of a file that its outputs depend on; what is called twice is told once.

    Raises:
        ArtifactError: If it is no ONNX file, or a damaged one.
    """
    found = OnnxCauses()
    for live in live_nodes(onnx):
        if live.node.domain in ("", "ai.onnx"):
            _look(live, found)
    return OnnxCauses(*(list(dict.fromkeys(told)) for told in (found.draws, found.batch, found.mixes)))


def _look(live: LiveNode, found: OnnxCauses) -> None:
    kind = live.node.op_type
    if kind in _RANDOM:
        found.draws.append(f"{live.told} draws random numbers")
    elif kind == "Dropout":
        found.draws += _dropout(live)
    elif kind == "BatchNormalization":
        if live.scope.integer(live.node, "training_mode", _by_default(live)):
            found.batch.append(f"{live.told} is in training mode: it takes the batch's own statistics")
    elif kind == "DynamicQuantizeLinear":
        found.mixes.append(f"{live.told} takes its range from the whole batch")
    elif kind.startswith("Reduce"):
        given = live.constant(1)
        if 0 in live.scope.integers(live.node, "axes", () if given is None else np.ravel(given).tolist()):
            found.mixes.append(f"{live.told} reduces over the batch")


def _by_default(live: LiveNode) -> int:
    """Return whether a node without `training_mode` is in training mode."""
    return int(0 < live.opset < _SILENT and not live.scope.integer(live.node, "is_test", 0))


def _dropout(live: LiveNode) -> list[str]:
    """Return what is wrong with a Dropout; one that drops nothing is none."""
    if live.opset < _DROPOUT_WITH_MODE:
        ratio = next((one.f for one in live.node.attribute if one.name == "ratio"), 0.5)
        return [f"{live.told} is in training mode"] if _by_default(live) and ratio else []
    given, mode = live.constant(1), live.constant(2)
    if given is not None and not np.any(given):
        return []
    if live.asks(2) and mode is None:
        return [f"{live.told} may be in training mode: '{live.asks(2)}' is computed"]
    return [f"{live.told} is in training mode"] if mode is not None and np.any(mode) else []
