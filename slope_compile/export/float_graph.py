"""The trained model as a float ONNX graph, every weight still an initializer under its own name."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from torch import nn

from slope_compile.compression.api import fold
from slope_compile.errors import ModelError

INPUT, OUTPUT, BATCH = "input", "output", "batch"
TRACED_BATCH = 2  # torch.export takes a batch of 1 for a constant


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the host, in eval mode; the model itself is left as it is."""
    return copy.deepcopy(model).cpu().eval()


def float_graph(model: nn.Module, shape: tuple[int, ...], opset: int) -> ir.Model:
    """Return the ONNX graph of a model's compressed weights, as torch.export sees it and not yet optimized.

    Args:
        model: A frozen copy (`frozen_copy`); its parametrizations are folded away here.
        shape: Shape of one input, without the batch axis.
        opset: ONNX operator set.

    Returns:
        A graph from `input` float32 [batch, *shape] to `output` [batch, ...].

    Raises:
        ModelError: If the model cannot be exported, or only with a fixed batch size.
    """
    fold(model)
    model.requires_grad_(False)
    example = torch.zeros(TRACED_BATCH, *shape)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                optimize=False,
                opset_version=opset,
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"torch.onnx.export cannot export {type(model).__name__} with a dynamic batch: {_reason(error)}.",
            "Change the model's forward so that torch.export can trace it with any batch size.",
        ) from error
    assert program is not None  # with dynamo=True there is always a program
    _check_signature(program.model, shape, type(model).__name__)
    return program.model


def _check_signature(graph: ir.Model, shape: tuple[int, ...], name: str) -> None:
    """One float32 input [batch, *shape], one output [batch, ...]: else the batch was burnt in, or there is more."""
    inputs, outputs = graph.graph.inputs, graph.graph.outputs
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"{name} has {len(inputs)} inputs and {len(outputs)} outputs in ONNX; one tensor each is supported.",
            "Wrap the model in a module that takes one tensor and returns one.",
        )
    for value, expected in ((inputs[0], (BATCH, *map(str, shape))), (outputs[0], (BATCH,))):
        dims = () if value.shape is None else tuple(str(dim) for dim in value.shape)
        if dims[: len(expected)] != expected:
            raise ModelError(
                f"{name} exports '{value.name}' as [{', '.join(dims)}] instead of [{', '.join(expected)}…].",
                "The first axis of input and output must be the batch, of any size.",
            )


def _reason(error: BaseException) -> str:
    """Return the innermost cause in one line: torch wraps what went wrong in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400].rstrip('. ')}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's prints, log lines and warnings to itself: stdout belongs to the command's own output."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
