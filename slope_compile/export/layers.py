"""layers.json: one row a layer, counted on the file that was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from slope_compile.compression.codes import CodedTensor
from slope_compile.export.placement import Placement
from slope_compile.qdq.tensors import element_bits
from slope_compile.qdq.weights import CodedWeight


def layer_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Return every Conv, ConvTranspose and Linear by the name of its weight, such as `layer1.0.conv1.weight`."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    }


def layer_rows(
    modules: Mapping[str, nn.Module],
    codes: Mapping[str, CodedTensor],
    placements: Mapping[str, tuple[str, Placement]],
    stored: Sequence[CodedWeight],
) -> list[dict[str, Any]]:
    """Return the rows of layers.json in the model's order.

    Bytes of `file` are codes and scales as the file has them, `fp32` the same weight at 4 bytes each; `density` is
    counted on what the file holds.

    Args:
        modules: The folded model's layers (`layer_weights`).
        codes: The coded weights among them.
        placements: Weight name -> (operator, placement), for every weight that only layers use.
        stored: What the reader found in the file.
    """
    by_name = {weight.name: weight for weight in stored}
    rows = []
    for name, module in modules.items():
        if name in placements and name in by_name:
            rows.append(_row(name, *placements[name], by_name[name], codes.get(name)))
        else:
            rows.append(_shared_row(name, module))
    return rows


def _row(name: str, op: str, placement: Placement, weight: CodedWeight, coded: CodedTensor | None) -> dict[str, Any]:
    size = weight.stored.size
    scale_bytes = 0 if weight.scale is None else weight.scale.nbytes
    return {
        "name": name,
        "op": op,
        "placement": placement.name,
        "reason": placement.reason,
        "container": weight.dtype,
        "bits": None if coded is None else coded.bits,
        "pattern": None if coded is None or coded.pattern is None else "{}:{}".format(*coded.pattern),
        "shape": list(weight.stored.shape),
        "bytes": {"fp32": 4 * size, "file": -(-size * element_bits(weight.dtype) // 8) + scale_bytes},
        "density": int(np.count_nonzero(weight.stored)) / max(size, 1),
    }


def _shared_row(name: str, module: nn.Module) -> dict[str, Any]:
    """Return the row of a float weight that the graph uses in its own way: computed, or part of a bigger operator."""
    weight: npt.NDArray[np.float32] = module.weight.detach().cpu().numpy()  # type: ignore[operator]
    if isinstance(module, nn.Linear):
        op = "MatMul"
    else:
        op = "ConvTranspose" if "ConvTranspose" in type(module).__name__ else "Conv"
    return {
        "name": name,
        "op": op,
        "placement": "float",
        "reason": "in float, and not a weight of its own in the graph: computed, or part of a bigger operator",
        "container": "FLOAT",
        "bits": None,
        "pattern": None,
        "shape": list(weight.shape),
        "bytes": {"fp32": weight.nbytes, "file": weight.nbytes},
        "density": int(np.count_nonzero(weight)) / max(weight.size, 1),
    }
