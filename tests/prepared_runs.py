"""Finished run folders of a small net, made without training: what `verify` and its options are tried on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper
from safetensors.numpy import save_file

from slope_compile.artifacts import FileDigest, RunFolder
from slope_compile.build.engine import build_run
from slope_compile.codes_file import save_codes
from slope_compile.compression.codes import CodedTensor
from slope_compile.events import Events
from slope_compile.export.placement import Placement
from slope_compile.pipeline import TRAIN_SECTIONS
from slope_compile.qdq.reader import coded_weights
from slope_compile.qdq.weights import CodedWeight
from slope_compile.recipe import Recipe, recipe_from
from slope_compile.targets.options import Options

PATTERNS = {"c.weight": (2, 4), "f.weight": None}
ENGINE = "build/a100/model.engine"


def recipe_of(**sections: Any) -> Recipe:
    """A recipe whose model and data are nowhere: what needs torch or the data is `not checked`."""
    raw: dict[str, Any] = {
        "model": {"name": "nowhere.py:model"},
        "data": {"source": "imagefolder:nowhere"},
        "build": {"targets": ["a100"]},
    }
    return recipe_from(raw | sections, "test")


def engine_row(name: str, **changed: Any) -> dict[str, Any]:
    """One row of a build's layers.json: a layer with a sparse INT8 kernel."""
    engine = {
        "layer": name, "layer_type": "gemm", "dtype": "Int8", "bytes": 64, "computed_by": None, "tactic": None,
        "fused": True, "fused_with": [], "sparse_eligible": True, "sparse_chosen": True, "sparse_note": "",
        "int8_product": True, "held": True, "note": None,
    } | changed.pop("engine", {})  # fmt: skip
    return {
        "name": name, "op": "Conv", "placement": "sparse-int8", "reason": "-", "container": "INT8", "bits": 4,
        "pattern": "2:4", "shape": [8, 8], "bytes": {"fp32": 256, "file": 40}, "density": 0.5, "fits_2_4": True,
        "engine": engine,
    } | changed  # fmt: skip


def layers_json(model: Path, engine: bytes, **changed: Any) -> dict[str, Any]:
    """What a build writes about its engine."""
    extent = [4, 6, 6]
    header = {
        "backend": "tensorrt", "version": "10.3.0", "target": "a100", "sm": "8.0",
        "profile": {"x": {"min": [1, *extent], "opt": [4, *extent], "max": [8, *extent]}},
        "onnx_sha256": FileDigest.of(model).sha256, "engine_sha256": digest_of(engine), "engine_bytes": len(engine),
        "sparse_weights": True, "options": Options().as_dict(),
    }  # fmt: skip
    told = "the engine's layer list"
    summary = {
        "layers": 2, "read_from": told, "coded": 2, "held": 2, "not_held": [], "not_found": [], "types": {"Int8": 2},
        "weight_bytes": 128, "int8": {"declared": 2, "multiplied": 2}, "int4": {"held": 0, "fused": 0}, "float": 0,
        "sparse": {
            "eligible": 2, "eligible_by": told, "chosen": 2, "chosen_by": told, "fits_2_4": 2, "possible": 2,
        },
        "line": "2 of 2 layers",
    }  # fmt: skip
    rows = [engine_row(name) for name in PATTERNS]
    return {"header": header, "summary": summary, "layers": rows} | changed


def digest_of(data: bytes) -> str:
    """The sha256 of bytes."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def make_run(
    path: Path,
    net: Callable[..., Path],
    *,
    recipe: Recipe | None = None,
    accuracy: float = 0.8,
    engine: bytes | None = b"plan",
    built: Mapping[str, Any] | None = None,
    really: bool = False,
) -> RunFolder:
    """A run folder, trained, exported and, unless `engine` is None, built.

    Args:
        path: Where.
        net: The fixture that writes the ONNX file.
        recipe: Default: `recipe_of()`.
        accuracy: Of the compressed model.
        engine: Bytes of the engine.
        built: Replaces parts of the build's layers.json.
        really: The engine is one, of TensorRT-RTX; its layers.json is true then.
    """
    recipe, folder = recipe or recipe_of(), RunFolder(path)
    train, export = folder.fresh_partial("train"), folder.fresh_partial("export")
    shutil.copy(net(), export / "model.onnx")
    save_codes(train / "codes.safetensors", codes_of(export / "model.onnx"))
    figures = {"metric": "accuracy", "fp32": {"accuracy": 0.9}, "compressed": {"accuracy": accuracy}}
    (train / "metrics.json").write_text(
        json.dumps(figures | {"fp32_bytes": 1000, "plan": [], "layers": {}, "epochs": []})
    )
    write_golden(export / "model.onnx", export / "golden.safetensors")
    write_list(export / "layers.json", export / "model.onnx", codes_of(export / "model.onnx"))
    if really:
        built_at = folder.fresh_partial("build/a100")
        build_run(recipe.build, "a100", export, built_at, Events())
    elif engine is not None:
        build = folder.fresh_partial("build/a100")
        (build / "model.engine").write_bytes(engine)
        shutil.copy(export / "model.onnx", build / "placed.onnx")
        layers = layers_json(export / "model.onnx", engine) | dict(built or {})
        (build / "layers.json").write_text(json.dumps(layers))
    folder.commit("train", {"recipe": recipe.digest(*TRAIN_SECTIONS)}, {})
    folder.commit("export", {}, {})
    if engine is not None:
        folder.commit("build/a100", {}, {}, ("build.log",))
    (path / "recipe.yaml").write_text(recipe.to_yaml())
    (path / ".slope-compile.lock").touch()
    return folder


def write_golden(model: Path, out: Path) -> None:
    """Golden samples as the model itself answers."""
    x = np.random.default_rng(0).normal(size=(6, 4, 6, 6)).astype(np.float32)
    (y,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    save_file({"inputs": x, "outputs": y}, out)


def write_list(path: Path, model: Path, codes: Mapping[str, CodedTensor]) -> Path:
    """Write the layers.json of an export of a file as it is."""
    from slope_compile.export.layers import layer_rows  # torch: most of what prepares runs needs none

    stored = coded_weights(model)
    placements = {one.name: (one.op, Placement(_placement(one), "-", one.dtype, one.block_size)) for one in stored}
    modules: dict[str, Any] = dict.fromkeys(placements)
    path.write_text(json.dumps({"layers": layer_rows(modules, codes, placements, stored)}))
    return path


def _placement(weight: CodedWeight) -> str:
    if weight.codes is None:
        return "float"
    if weight.dtype == "INT8":
        return "int8-weight"
    return "int4-weight" if weight.block_size else "int4-storage"


def codes_of(model: Path) -> dict[str, CodedTensor]:
    """The checkpoint's coded tensors: those of the file."""
    stored = {tensor.name: tensor for tensor in onnx.load(model).graph.initializer}
    found = {}
    for name, pattern in PATTERNS.items():
        codes = numpy_helper.to_array(stored[f"{name}.codes"]).astype(np.int8)
        scale = numpy_helper.to_array(stored[f"{name}.scale"]).reshape(-1).copy()
        found[name] = CodedTensor(codes=codes, scale=scale, bits=4, axis=0, pattern=pattern)
    return found


def flip_code(model: Path) -> None:
    """Another code in the first weight: `codes` fails, and what compares with the golden outputs."""
    proto = onnx.load(model)
    (tensor,) = (tensor for tensor in proto.graph.initializer if tensor.name == "f.weight.codes")
    raw = bytearray(tensor.raw_data)
    raw[:64] = bytes(64)
    tensor.raw_data = bytes(raw)
    onnx.save(proto, model)
