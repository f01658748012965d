"""The trained model as a float ONNX graph, every weight still an initializer under its own name."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence

import onnx_ir as ir
import torch
from torch import nn
from torch.nn.utils import parametrize

from slope_compile.compression.api import fold
from slope_compile.errors import ModelError
from slope_compile.export.detection.suppress import TRANSLATIONS
from slope_compile.export.passes.activations import emit_quantizers

INPUT, OUTPUT, BATCH = "input", "output", "batch"
TRACED_BATCH = 2  # torch.export takes a batch of 1 for a constant


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model on the host, in eval mode, that can be folded with the model itself left as it is."""
    frozen = copy.deepcopy(model).cpu().eval()
    for module in frozen.modules():
        if parametrize.is_parametrized(module):
            # A copy shares its class with the original, and folding deletes the `weight` property of the class.
            shared = type(module)
            own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            module.__class__ = type(shared.__name__, shared.__bases__, own)
    return frozen


def float_graph(model: nn.Module, shape: tuple[int, ...], opset: int, outputs: Sequence[str] = (OUTPUT,)) -> ir.Model:
    """Return the ONNX graph of a model's compressed weights, as torch.export sees it and not yet optimized.

    Args:
        model: A frozen copy (`frozen_copy`); its parametrizations are folded away here, and its quantizers of
            activations become operators of ours (`passes/activations.py`).
        shape: Shape of one input, without the batch axis.
        opset: ONNX operator set.
        outputs: Names of what the model returns, in order.

    Returns:
        A graph from `input` float32 [batch, *shape] to the outputs, each [batch, ...].

    Raises:
        ModelError: If the model cannot be exported, or only with a fixed batch size.
    """
    fold(model)
    emit_quantizers(model)
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
                output_names=list(outputs),
                custom_translation_table=TRANSLATIONS,
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
    """The input is [batch, *shape], outputs [batch, ...]: torch falls back to a fixed batch without a word."""
    (given,) = graph.graph.inputs
    for value, expected in ((given, (BATCH, *map(str, shape))), *((made, (BATCH,)) for made in graph.graph.outputs)):
        dims = () if value.shape is None else tuple(str(dim) for dim in value.shape)
        if dims[: len(expected)] != expected:
            raise ModelError(
                f"{name} exports '{value.name}' as [{', '.join(dims)}], not as [{', '.join(expected)}…]: "
                "its forward fixes or moves the batch axis.",
                "The first axis of the input and of every output must be the batch, of any size.",
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
