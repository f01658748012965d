"""What `build` writes beside an engine, made of its own parts without building one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slope_compile.artifacts import FileDigest
from slope_compile.build.counts import summarize
from slope_compile.build.engine import batch_profile
from slope_compile.build.rows import engine_rows
from slope_compile.placement.choose import Place
from slope_compile.qdq.matrices import GEMM
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.tensors import load_model
from slope_compile.qdq.weights import CodedWeight
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.options import Options


def place(weight: CodedWeight) -> Place:
    """Where a weight that is not multiplied with integers may be left as it is."""
    if weight.codes is None:
        return Place(weight.dtype, "float", "because")
    if weight.dtype == "INT4":
        return Place("INT4", "int4-weight" if weight.op in GEMM else "int4-storage", "because")
    return Place("INT8", "int8-weight", "because")


def write_layers(
    build: Path, onnx: Path, engine: str = "model.engine", log: str = "", export: Any = None, **header: Any
) -> Path:
    """Write layers.json of an engine that was built from a file as it is."""
    backend = BACKENDS["tensorrt-rtx"]
    weights, graph = coded_weights(onnx), load_model(onnx).graph
    rows = engine_rows(weights, [place(weight) for weight in weights], graph, log, backend, export)
    digest = FileDigest.of(build / engine)
    profile = batch_profile(graph, (1, 2, 4))
    told: dict[str, Any] = {
        "backend": backend.name,
        "version": "1.7.1.116",
        "target": "a100",
        "sm": "8.0",
        "profile": {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in profile.items()},
        "precision": "fp32",
        "precision_reason": "asked for",
        "onnx_sha256": FileDigest.of(onnx).sha256,
        "engine_sha256": digest.sha256,
        "engine_bytes": digest.size,
        "sparse_weights": False,
        "options": Options().as_dict(),
        "notes": [],
    }
    layers = {"header": told | header, "summary": summarize(rows, log, backend), "layers": rows}
    path = build / ("layers.json" if engine == "model.engine" else f"{engine}.layers.json")
    path.write_text(json.dumps(layers, indent=1))
    return path
