"""What can be said of an engine whose outputs differ: where to look, on a machine that can build it again.

An engine hands out the tensors that it was built to hand out, and fuses the others away. Its layers are compared in an
engine built from the same file with all of them marked, on the GPU; such an engine fuses less, so where its outputs
agree, fusing is what made the difference.
"""

from __future__ import annotations

import shlex
from pathlib import Path

INPUTS = Path("chain", "inputs.json")


def engine_command(built_from: Path, atol: float) -> str:
    """Return the command that compares every layer of an engine with ONNX Runtime, in a verification's folder.

    Args:
        built_from: The ONNX file that the engine was built from.
        atol: The largest |difference| allowed.
    """
    where = ["polygraphy", "run", f"{built_from}", "--trt", "--strongly-typed", "--trt-outputs", "*"]
    reference = ["--onnxrt", "--graph-optimization-level", "ORT_DISABLE_ALL", "--onnx-outputs", "*"]
    what = ["--load-inputs", INPUTS.as_posix(), "--atol", f"{atol:.6g}", "--rtol", "0", "--fail-fast"]
    return shlex.join([*where, *reference, *what])


def engine_note(built_from: Path, atol: float) -> str:
    """Return what a failed `parity.engine` says of its layers: that they were not checked, and how they can be.

    Args:
        built_from: As `engine_command`.
        atol: As `engine_command`.
    """
    why = "which layer differs was not checked: it takes an engine built with all of its tensors marked, on its GPU"
    fused = "where such an engine agrees, the layers were fused at lower precision"
    return f"{why}: {engine_command(built_from, atol)}; {fused}"
