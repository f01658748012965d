"""What the trained model answers, kept beside the ONNX file: the reference of every later stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor

from slope_compile.codes_file import codes_digest, scale_digest
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ModelError
from slope_compile.export.float_graph import OUTPUT
from slope_compile.qdq.sites import Sites

# The one header entry, what the outputs were made with: safetensors keeps several in no fixed order.
MADE_WITH = "made_with"
CHUNK = 32  # images at once, so that many samples do not need much memory


def golden_outputs(model: Callable[[Tensor], object], inputs: Tensor) -> dict[str, Tensor]:
    """Return the model's outputs by name, float32 [samples, ...], with its parametrizations as they are.

    Args:
        model: The trained model, in eval mode, on the host. It returns a tensor, which is called `output`, or a mapping
            of names to tensors.
        inputs: float32 [samples, ...].

    Raises:
        ModelError: If the model returns anything but tensors with a row a sample, or numbers that are not finite.
    """
    name = type(model).__name__
    with torch.no_grad():
        chunks = [_named(model(chunk), len(chunk), name) for chunk in inputs.split(CHUNK)]
    outputs = {key: torch.cat([chunk[key] for chunk in chunks]).float() for key in chunks[0]}
    if not all(output.isfinite().all() for output in outputs.values()):
        raise ModelError(f"{name} returns NaN or infinity for the golden inputs.", "Train it again.")
    return outputs


def write_golden(
    path: Path,
    inputs: Tensor,
    outputs: Mapping[str, Tensor],
    codes: Mapping[str, CodedTensor] | None = None,
    sites: Sites | None = None,
) -> None:
    """Write `inputs`, and `outputs` (a lone one) or `outputs.NAME` for each, float32, as safetensors.

    Args:
        path: The file.
        inputs: float32 [samples, ...].
        outputs: As `golden_outputs` returns them.
        codes: The model's coded tensors: the file's header has digests of their codes and scales, so that it is known
            for another model's, and an ONNX file that lies alone is known for damaged.
        sites: Its quantizers of activations, named likewise: the same weights without them answer otherwise. None:
            nothing is said of them.
    """
    tensors = {"inputs": inputs.contiguous().numpy()}
    for name, output in outputs.items():
        tensors["outputs" if list(outputs) == [OUTPUT] else f"outputs.{name}"] = output.contiguous().numpy()
    # Not save_file: a full disk must show as OSError.
    header: dict[str, Any] = {}
    if codes:
        header["codes"] = {name: codes_digest(np.asarray(coded.codes)) for name, coded in sorted(codes.items())}
        header["weights"] = {
            name: {
                "axis": coded.axis,
                "bits": coded.bits,
                "pattern": None if coded.pattern is None else "{}:{}".format(*coded.pattern),
                "scale": scale_digest(np.asarray(coded.scale)),
            }
            for name, coded in sorted(codes.items())
        }
    if sites is not None:
        header["activations"] = sites.to_json()
    metadata = {MADE_WITH: json.dumps(header)} if header else None
    path.write_bytes(safetensors.numpy.save(tensors, metadata=metadata))


def _named(answer: object, rows: int, model: str) -> dict[str, Tensor]:
    """Return a model's answer to `rows` samples as a mapping."""
    named: dict[str, Any] = dict(answer) if isinstance(answer, Mapping) else {OUTPUT: answer}
    for name, output in named.items():
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != rows:
            made = f"a tensor {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            what = made if name == OUTPUT else f"{made} as '{name}'"
            raise ModelError(
                f"{model} returns {what}, not a tensor with a row for each input.",
                "Wrap the model in a module that returns one tensor, or a dict of tensors.",
            )
    if not named or not all(isinstance(name, str) for name in named):
        raise ModelError(f"{model} returns a dict without names or tensors.", "Name each output with a text.")
    return named
