"""golden.safetensors: inputs, and what the trained model gave for them at export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import load_file

from slope_compile.errors import ArtifactError
from slope_compile.verify.runners import Array, Arrays

MAX_GOLDEN_BYTES = 2**32
REMEDY = "Make it anew with `slope-compile export`."


@dataclass(frozen=True)
class Golden:
    """Inputs (samples, ...) and the trained model's outputs (samples, ...) by name; a lone one has the name ""."""

    inputs: Array
    outputs: Arrays


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
    several = len(tensors) > 1 and all(name.startswith("outputs.") for name in tensors if name != "inputs")
    if "inputs" not in tensors or not (several or sorted(tensors) == ["inputs", "outputs"]):
        raise ArtifactError(f"{path.name} holds {', '.join(sorted(tensors)) or 'nothing'}, no golden samples.", REMEDY)
    inputs = tensors.pop("inputs")
    for name, output in tensors.items():
        if not inputs.ndim or not len(inputs) or output.shape[:1] != inputs.shape[:1]:
            shapes = f"inputs {inputs.shape} and {name} {output.shape}"
            raise ArtifactError(f"{path.name} holds {shapes}: not one output a sample.", REMEDY)
    return Golden(inputs, {name.partition(".")[2]: output for name, output in tensors.items()})
