"""Correct artifacts that are written otherwise: verification must pass them all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
import zstandard
from checkpoint_mutations import edited_tensors
from golden_mutations import GOLDEN
from graph_variants import GRAPH_VARIANTS, identities, renamed_values
from mutation import Corrupt, Subject, Variant
from onnx import shape_inference, version_converter
from onnx_edits import MODEL, PLACED, edited
from packed_edits import PACKED, grouped, repacked, resigned, restored_streams

from slope_compile.pack.write import pack_run
from slope_compile.recipe import load_recipe
from slope_compile.train.trained import load_trained


def _saved(kind: str, change: Callable[[Path], object], subject: str = "float") -> Variant:
    """A model that a tool wrote anew, in place."""
    return Variant(kind, "model.onnx", lambda one: (change(one.file(MODEL)), None)[1], subject)


def _by_onnx(path: Path) -> None:
    onnx.save(onnx.load(path), path)


def _by_onnx_ir(path: Path) -> None:
    ir.save(ir.load(path), path)


def _inferred(path: Path) -> None:
    onnx.save(shape_inference.infer_shapes(onnx.load(path)), path)


def _converted(version: int) -> Callable[[Path], None]:
    return lambda path: onnx.save(version_converter.convert_version(onnx.load(path), version), path)


def _outside(path: Path) -> None:
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="model.onnx.data", size_threshold=100)


def _one_file_each(path: Path) -> None:
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=1000)


def _inside(path: Path) -> None:
    model = onnx.load(path)
    path.with_name("model.onnx.data").unlink()
    onnx.save(model, path)


def _optimized(path: Path) -> None:
    """What ONNX Runtime writes after its basic optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(path.with_suffix(".tmp"))
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.with_suffix(".tmp").replace(path)


def _appended(subject: Subject) -> None:
    with subject.file(f"{MODEL}.data").open("ab") as file:
        file.write(b"nobody points here")


def _golden(change: Callable[[Any], Any]) -> Corrupt:
    """Both halves of the golden file changed alike."""

    def edit(tensors: dict[str, Any], texts: dict[str, str]) -> None:
        for name in tensors:
            tensors[name] = change(tensors[name])

    return edited_tensors(GOLDEN, edit)


def _other_samples(scale: float, count: int) -> Corrupt:
    """Other inputs, and what the trained model gives for them."""

    def corrupt(subject: Subject) -> None:
        model = load_trained(load_recipe(subject.file("recipe.yaml")), subject.file("train"))

        def edit(tensors: dict[str, Any], texts: dict[str, str]) -> None:
            random = np.random.default_rng(7)
            x = (scale * random.standard_normal((count, *tensors["inputs"].shape[1:]))).astype(np.float32)
            with torch.inference_mode():
                tensors.update(inputs=x, outputs=model(torch.from_numpy(x)).numpy())

        edited_tensors(GOLDEN, edit)(subject)

    return corrupt


def _named_outputs(tensors: dict[str, Any], texts: dict[str, str]) -> None:
    texts["made"] = "elsewhere"


def _batches_counted(tensors: dict[str, Any], texts: dict[str, str]) -> None:
    tensors["norm.num_batches_tracked"] += 1


def _counted_and_packed(subject: Subject) -> None:
    """A checkpoint and its packed file, of a training that ran for one batch more."""
    edited_tensors("train/checkpoint.safetensors", _batches_counted)(subject)
    pack_run(subject.file("train"), subject.file(PACKED))


def _last_bit_of_a_latent(tensors: dict[str, Any], texts: dict[str, str]) -> None:
    """The latent behind a code that is far from the next one."""
    name = "conv.parametrizations.weight.original"
    latent = tensors[name].copy()
    place = np.unravel_index(np.abs(latent).argmin(), latent.shape)
    latent[place] *= np.float32(0.999)
    tensors[name] = latent


def _not_packed(subject: Subject) -> None:
    """A run of before there were packed files."""
    subject.file(PACKED).unlink()
    manifest = json.loads(subject.file("manifest.json").read_text())
    del manifest["stages"]["pack"]
    subject.file("manifest.json").write_text(json.dumps(manifest))


def _touch(subject: Subject) -> None:
    for path in subject.path.rglob("*"):
        path.touch()


def _moved(subject: Subject) -> None:
    """The folder under another name, reached through a link of the old one."""
    elsewhere = subject.path.with_name("moved")
    subject.path.rename(elsewhere)
    subject.path.symlink_to(elsewhere)


def _reindented(subject: Subject) -> None:
    path = subject.file("manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4, sort_keys=True))


def _without_extras(subject: Subject) -> None:
    for name in ("events.jsonl", "report.html"):
        subject.file(name).unlink(missing_ok=True)
    shutil.rmtree(subject.file("verify"), ignore_errors=True)


VARIANTS = [
    *GRAPH_VARIANTS,
    _saved("saved by onnx", _by_onnx),
    _saved("saved by onnx_ir", _by_onnx_ir),
    _saved("saved by onnx_ir, activations quantized", _by_onnx_ir, "int8"),
    _saved("shapes inferred by onnx", _inferred),
    _saved("converted to opset 22", _converted(22)),
    _saved("converted to opset 23", _converted(23)),
    _saved("converted to opset 24, activations quantized", _converted(24), "int8"),
    _saved("written by ONNX Runtime", _optimized),
    _saved("tensors moved outside", _outside),
    _saved("each tensor in a file of its own", _one_file_each),
    _saved("tensors moved inside", _inside, "external"),
    Variant("bytes that nobody points to", "model.onnx.data", _appended, "external"),
    Variant("one sample", "golden.safetensors", _golden(lambda array: array[:1])),
    Variant("samples in another order", "golden.safetensors", _golden(lambda array: array[::-1])),
    Variant("each sample twice", "golden.safetensors", _golden(lambda array: np.concatenate([array, array]))),
    Variant("other samples", "golden.safetensors", _other_samples(1, 6)),
    Variant("an input of zeros", "golden.safetensors", _other_samples(0, 1)),
    Variant("large inputs", "golden.safetensors", _other_samples(100, 3)),
    Variant("another header", "golden.safetensors", edited_tensors(GOLDEN, _named_outputs)),
    Variant("a batch norm's count of batches, packed too", "checkpoint.safetensors", _counted_and_packed),
    Variant(
        "a latent moved that is pruned anyway",
        "checkpoint.safetensors",
        edited_tensors("train/checkpoint.safetensors", _last_bit_of_a_latent),
    ),
    Variant("written anew", "packed file", repacked(lambda content: None)),
    Variant("written anew, activations quantized", "packed file", repacked(lambda content: None), "int8"),
    Variant("zstd at its highest level", "packed file", restored_streams(lambda raw: zstandard.compress(raw, 22))),
    Variant("every run stored as it is", "packed file", restored_streams(lambda raw: raw)),
    Variant("codes in groups of 8", "packed file", grouped((8,))),
    Variant("codes in groups as they lie", "packed file", grouped(())),
    Variant("header as it is", "packed file", resigned(lambda opened: None)),
    Variant("header as a zstd frame", "packed file", resigned(lambda opened: None, compressed=True)),
    Variant("a run that was not packed", "packed file", _not_packed),
    Variant("every run stored as it is", "packed file alone", restored_streams(lambda raw: raw), "packed"),
    Variant("values renamed", "placed.onnx", edited(PLACED, renamed_values)),
    Variant("Identity behind operators", "placed.onnx", edited(PLACED, identities)),
    Variant("every file's time", "manifest", _touch),
    Variant("the folder moved, a link in its place", "manifest", _moved),
    Variant("written with other spaces", "manifest", _reindented),
    Variant("report, events and earlier verdict deleted", "manifest", _without_extras),
]
