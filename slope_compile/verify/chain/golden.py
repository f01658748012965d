"""golden.safetensors: inputs, and what the trained model gave for them at export.

Its header names the model that it was made from: a digest of each weight's codes and scales, and its quantizers of
activations. So samples of another model are known for what they are, and not taken for an error of this one; and codes
can be proved where no checkpoint is (`laws/kept.py`). Files of older exports have no such header, or name less.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from slope_compile.codes_file import codes_digest
from slope_compile.errors import ArtifactError
from slope_compile.qdq.reader import iter_weights
from slope_compile.qdq.sites import Sites
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import parse_pattern
from slope_compile.tensor_file import TensorFile
from slope_compile.verify.chain.runners import Array, Arrays

if TYPE_CHECKING:
    from onnx import GraphProto, ValueInfoProto

MAX_GOLDEN_BYTES = 2**32
MAX_OUTPUTS = 1000
REMEDY = "Make it anew with `slope-compile export`."
_MADE_WITH, _OLDER = "made_with", "codes"  # header entries; older exports named codes alone


class KeptWeight(NamedTuple):
    """What a coded weight was when the samples were made, its codes aside."""

    axis: int
    bits: int
    pattern: tuple[int, int] | None
    scale: str

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> KeptWeight:
        """Return what the header says of a weight.

        Raises:
            ValueError, KeyError, TypeError: If it says something else.
        """
        pattern = None if kept["pattern"] is None else parse_pattern(kept["pattern"])
        return cls(int(kept["axis"]), int(kept["bits"]), pattern, str(kept["scale"]))


@dataclass(frozen=True)
class Golden:
    """Inputs (samples, ...) and the trained model's outputs (samples, ...) by name; a lone one has the name "".

    Args:
        inputs: What the model got.
        outputs: What it gave.
        codes: Weight -> digest of its codes; empty where the file does not say.
        weights: Weight -> what else it was; empty where the file does not say.
        sites: Its quantizers of activations; None where the file does not say.
        name: What to call the file.
    """

    inputs: Array
    outputs: Arrays
    codes: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, KeptWeight] = field(default_factory=dict)
    sites: Sites | None = None
    name: str = "golden.safetensors"


def read_golden(path: Path) -> Golden:
    """Read golden inputs and outputs.

    Raises:
        ArtifactError: If the file is missing, too big, truncated, holds anything else, or numbers that are not finite.
    """
    try:
        size = path.stat().st_size
        if size > MAX_GOLDEN_BYTES:
            raise ArtifactError(f"{path.name} is {size} bytes; golden samples have at most {MAX_GOLDEN_BYTES}.", REMEDY)
        file = TensorFile(path)
        if len(file.entries) > MAX_OUTPUTS:
            raise ValueError(f"{len(file.entries)} tensors, more than {MAX_OUTPUTS}")
        tensors = {name: file.read(name) for name in file.entries}
        made_with = json.loads(file.metadata.get(_MADE_WITH, "{}"))
        named = made_with.get("codes", json.loads(file.metadata.get(_OLDER, "{}")))
        codes = {str(name): str(digest) for name, digest in named.items()}
        weights = {str(name): KeptWeight.of(kept) for name, kept in made_with.get("weights", {}).items()}
        sites = Sites.from_json(made_with["activations"]) if "activations" in made_with else None
    except FileNotFoundError:
        raise ArtifactError(f"{path.name} is missing.", REMEDY) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path.name} is no safetensors file, or is cut off: {error}.", REMEDY) from None
    several = len(tensors) > 1 and all(name.startswith("outputs.") for name in tensors if name != "inputs")
    if "inputs" not in tensors or not (several or sorted(tensors) == ["inputs", "outputs"]):
        raise ArtifactError(f"{path.name} holds {', '.join(sorted(tensors)) or 'nothing'}, no golden samples.", REMEDY)
    for name, array in tensors.items():
        if array.dtype.kind == "f" and (bad := np.count_nonzero(~np.isfinite(array))):
            raise ArtifactError(f"{path.name}: {bad} of {array.size} numbers of '{name}' are NaN or infinite.", REMEDY)
    inputs = tensors.pop("inputs")
    for name, output in tensors.items():
        if not inputs.ndim or not len(inputs) or output.shape[:1] != inputs.shape[:1]:
            shapes = f"inputs {inputs.shape} and {name} {output.shape}"
            raise ArtifactError(f"{path.name} holds {shapes}: not one output a sample.", REMEDY)
    outputs = {name.partition(".")[2]: output for name, output in tensors.items()}
    return Golden(inputs, outputs, codes, weights, sites, path.name)


def require_own(golden: Golden, onnx: Path) -> None:
    """Raise if golden samples were made from other codes than a file holds: if none of its weights is the same.

    Where some are the same and some are not, the file was damaged: that is for `codes` and `pattern` to say.

    Args:
        golden: The samples.
        onnx: The file; read until a weight is found to be the same.

    Raises:
        ArtifactError: If they are another model's, or the file cannot be read.
    """
    if not golden.codes:
        return
    for weight in iter_weights(onnx):
        wanted = golden.codes.get(weight.name)
        if wanted is not None and weight.codes is not None and _digest(weight) == wanted:
            return
        del weight
    made_with = f"the {len(golden.codes)} coded weights that it was made with"
    raise ArtifactError(f"{golden.name} is of another model: {onnx.name} holds none of {made_with}.", REMEDY)


def _digest(weight: CodedWeight) -> str:
    return codes_digest(weight.as_trained().stored)


def require_shapes(graph: GraphProto, arrays: Arrays) -> None:
    """Raise where golden outputs have not the shape of the model's, as far as the model says it.

    Args:
        graph: The model's.
        arrays: By output.

    Raises:
        ArtifactError: Naming the first.
    """
    for value in graph.output:
        if value.name in arrays and not _fits(value, arrays[value.name]):
            dims: list[Any] = [dim.dim_value or dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
            shape = list(arrays[value.name].shape)
            raise ArtifactError(f"The golden output '{value.name}' is {shape}; the ONNX model has {dims}.", REMEDY)


def _fits(value: ValueInfoProto, array: Array) -> bool:
    if not value.type.tensor_type.HasField("shape"):
        return True
    dims = value.type.tensor_type.shape.dim
    fixed = [dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in dims]
    return len(fixed) == array.ndim and all(n is None or n == m for n, m in zip(fixed, array.shape, strict=True))
