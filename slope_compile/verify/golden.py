"""golden.safetensors: inputs, and what the trained model gave for them at export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from slope_compile.errors import ArtifactError
from slope_compile.verify.runners import Array

MAX_GOLDEN_BYTES = 2**32
REMEDY = "Make it anew with `slope-compile export`."


@dataclass(frozen=True)
class Golden:
    """Inputs (samples, ...) and the trained model's outputs (samples, ...)."""

    inputs: Array
    outputs: Array


def read_golden(path: Path) -> Golden:
    """Read golden inputs and outputs.

    Raises:
        ArtifactError: If the file is missing, too big, truncated, or holds anything else.
    """
    try:
        size = path.stat().st_size
        if size > MAX_GOLDEN_BYTES:
            raise ArtifactError(f"{path.name} is {size} bytes; golden samples have at most {MAX_GOLDEN_BYTES}.", REMEDY)
        tensors = load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path.name} is missing.", REMEDY) from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path.name} is no safetensors file, or is cut off: {error}.", REMEDY) from None
    if sorted(tensors) != ["inputs", "outputs"]:
        raise ArtifactError(f"{path.name} holds {', '.join(sorted(tensors)) or 'nothing'}, no golden samples.", REMEDY)
    golden = Golden(tensors["inputs"], tensors["outputs"])
    if not golden.inputs.ndim or not len(golden.inputs) or golden.outputs.shape[:1] != golden.inputs.shape[:1]:
        shapes = f"inputs {golden.inputs.shape} and outputs {golden.outputs.shape}"
        raise ArtifactError(f"{path.name} holds {shapes}: not one output a sample.", REMEDY)
    return golden
