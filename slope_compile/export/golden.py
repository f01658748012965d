"""What the trained model answers, kept beside the ONNX file: the reference of every later stage."""

from __future__ import annotations

from pathlib import Path

import safetensors.numpy
import torch
from torch import nn

from slope_compile.errors import ModelError

CHUNK = 32  # images at once, so that many samples do not need much memory


def golden_outputs(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the model's outputs, float32 [samples, ...], with its parametrizations as they are.

    Args:
        model: The trained model, in eval mode, on the host.
        inputs: float32 [samples, ...].

    Raises:
        ModelError: If the model returns anything but one tensor with a row a sample, or numbers that are not finite.
    """
    with torch.no_grad():
        chunks = [model(chunk) for chunk in inputs.split(CHUNK)]
    wrong = [c for c, x in zip(chunks, inputs.split(CHUNK), strict=True) if not _is_batch(c, len(x))]
    if wrong:
        made = f"a tensor {list(wrong[0].shape)}" if isinstance(wrong[0], torch.Tensor) else type(wrong[0]).__name__
        raise ModelError(
            f"{type(model).__name__} returns {made}, not one tensor with a row for each input.",
            "Wrap the model in a module that returns one tensor.",
        )
    outputs = torch.cat(chunks).float()
    if not outputs.isfinite().all():
        raise ModelError(f"{type(model).__name__} returns NaN or infinity for the golden inputs.", "Train it again.")
    return outputs


def write_golden(path: Path, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    """Write `inputs` and `outputs`, float32, as safetensors."""
    tensors = {"inputs": inputs.contiguous().numpy(), "outputs": outputs.contiguous().numpy()}
    # Not save_file: a full disk must show as OSError.
    path.write_bytes(safetensors.numpy.save(tensors))


def _is_batch(output: object, rows: int) -> bool:
    return isinstance(output, torch.Tensor) and output.ndim > 0 and len(output) == rows
