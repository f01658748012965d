"""The whole export of one model: golden outputs, float graph, passes, the file, layers.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slope_compile.compression.activations import trained_quantizers
from slope_compile.compression.codes import CodedTensor
from slope_compile.events import Events
from slope_compile.export.detection import graph_form, own_answer
from slope_compile.export.float_graph import float_graph, frozen_copy
from slope_compile.export.golden import golden_outputs, write_golden
from slope_compile.export.layers import layer_rows, layer_weights
from slope_compile.export.passes import run_pass
from slope_compile.export.passes.activations import ProveActivations, QuantizeActivations
from slope_compile.export.passes.clean import CleanModel
from slope_compile.export.passes.hold import HoldWeights
from slope_compile.export.passes.optimize import Optimize
from slope_compile.export.passes.quantize import QuantizeWeights
from slope_compile.export.passes.write import EXTERNAL_OVER, WriteModel
from slope_compile.qdq.sites import sites_of

STAGE = "export"


@dataclass(frozen=True)
class Files:
    """Where an export goes."""

    model: Path
    golden: Path
    layers: Path

    @classmethod
    def inside(cls, folder: Path) -> Files:
        """Return a run's names: model.onnx, golden.safetensors, layers.json."""
        return cls(folder / "model.onnx", folder / "golden.safetensors", folder / "layers.json")

    @classmethod
    def beside(cls, path: Path) -> Files:
        """Return names beside a file of any name: m.onnx, m.golden.safetensors, m.layers.json."""
        return cls(path, path.with_suffix(".golden.safetensors"), path.with_suffix(".layers.json"))


def export_model(
    model: nn.Module,
    codes: Mapping[str, CodedTensor],
    inputs: torch.Tensor,
    files: Files,
    opset: int,
    events: Events,
    external_over: int = EXTERNAL_OVER,
) -> dict[str, Any]:
    """Write a trained model as ONNX with coded weights, and prove on the written bytes that they are the trained ones.

    Args:
        model: The trained model, its parametrizations in place; it is left as it is.
        codes: Weight name -> codes, as trained.
        inputs: Golden inputs, float32 [samples, ...]; their shape without the first axis is the model's input shape.
        files: What to write.
        opset: ONNX operator set, 21 or later.
        events: Told of each step.
        external_over: Bytes of tensors above which they go into `FILE.data`.

    Returns:
        What layers.json holds.

    Raises:
        ModelError: If the model cannot be exported with a dynamic batch, or a coded weight does not survive as it is.
        CheckFailedError: If the bytes on disk do not hold what was trained.
        OSError: If the disk is full or read-only.
    """
    for name, tensor in codes.items():
        tensor.check(name)
    copy = frozen_copy(model)
    inputs = inputs.detach().cpu().float()
    events.progress(STAGE, 0, 4, "golden outputs")
    exported = graph_form(copy, tuple(inputs.shape[1:]))
    outputs = golden_outputs(own_answer(copy, exported), inputs)

    events.progress(STAGE, 1, 4, "float graph")
    quantizers = trained_quantizers(exported)
    graph = float_graph(exported, tuple(inputs.shape[1:]), opset, list(outputs))
    modules = layer_weights(exported)

    events.progress(STAGE, 2, 4, "passes")
    hold = HoldWeights(codes, list(modules))
    run_pass(hold, graph)
    run_pass(Optimize(opset), graph)
    activations = QuantizeActivations(quantizers)
    run_pass(activations, graph)
    quantize = QuantizeWeights(hold.held, codes, opset)
    run_pass(quantize, graph)
    run_pass(CleanModel(), graph)

    events.progress(STAGE, 3, 4, "write and read back")
    write = WriteModel(files.model, codes, quantize.placements, external_over)
    run_pass(write, graph)
    run_pass(ProveActivations(files.model, quantizers, activations.placed), graph)
    write_golden(files.golden, inputs, outputs, codes, sites_of(files.model, quantizers))
    layers: dict[str, Any] = {"layers": layer_rows(modules, codes, quantize.placements, write.weights)}
    if quantizers:
        placed = activations.placed
        layers["activations"] = [{**asdict(one), "pairs": placed[name]} for name, one in quantizers.items()]
    files.layers.write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
    events.progress(STAGE, 4, 4, "done")
    return layers
