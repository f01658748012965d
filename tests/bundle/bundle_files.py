"""Recipes and archives: small ones of the right form, and those that are made wrong on purpose."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, load, numpy_helper

from slope_compile.artifacts import FileDigest
from slope_compile.bundle.archive import opened_bundle
from slope_compile.bundle.contents import INDEX, KIND, REQUIRED, Contents, Entry
from slope_compile.bundle.pack import EPOCH, write_bundle
from slope_compile.compression.codes import CodedTensor
from slope_compile.recipe import BuildSection, Recipe, recipe_from

BUILD = {"targets": ["a100"], "backend": "tensorrt-rtx", "batch": {"opt": 2, "max": 4}, "precision": "fp32"}
JETPACK_6 = {"system": "JetPack 6", "from": "10.3", "below": "10.8"}


def contents_of(files: dict[str, Path], **changed: Any) -> Contents:
    given: dict[str, Any] = {
        "format": 1,
        "kind": KIND,
        "made_by": "0.1.0",
        "name": "tiny",
        "target": "orin",
        "backend": "tensorrt",
        "planned_for": "10.3",
        "versions": [JETPACK_6],
        "build": BuildSection(targets=["orin"]),
        "precision": "fp16",
        "precision_reason": "auto",
        "allowed": {"relative": 1e-3, "derivation": "measured"},
        "metric": "accuracy",
        "accuracies": {"fp32": 0.9, "compressed": None},
        "files": {name: entry_of(path) for name, path in files.items()},
    }
    return Contents.model_validate(given | changed)


def entry_of(path: Path) -> Entry:
    found = FileDigest.of(path)
    return Entry(size=found.size, sha256=found.sha256)


def make_bundle(folder: Path) -> tuple[Path, Contents]:
    """An archive in `folder`, of files that say their names."""
    files = {}
    for name in sorted(REQUIRED):
        files[name] = folder / name
        files[name].write_bytes(name.encode() * 20)
    contents = contents_of(files)
    write_bundle(folder / "tiny.orin.bundle.zip", contents, files)
    return folder / "tiny.orin.bundle.zip", contents


def rewritten(source: Path, out: Path, changes: dict[str, bytes | None], **entry: Any) -> Path:
    """Copy an archive with other, further (or, None, without) members; `entry` sets attributes of the changed ones."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        members = {name: old.read(name) for name in old.namelist()} | changes
        for name, data in members.items():
            if data is not None:
                info = zipfile.ZipInfo(name, EPOCH)
                info.compress_type = zipfile.ZIP_DEFLATED
                for attribute, value in entry.items() if name in changes else ():
                    setattr(info, attribute, value)
                new.writestr(info, data)
    return out


def index_with(archive: Path, **changed: Any) -> bytes:
    """The archive's bundle.json with other top-level values."""
    with zipfile.ZipFile(archive) as opened:
        return json.dumps(json.loads(opened.read(INDEX)) | changed).encode()


def changed(archive: Path, name: str, data: bytes) -> Path:
    """The archive with another file, whose checksum is right."""
    (archive.parent / "new").write_bytes(data)
    with opened_bundle(archive) as opened:
        contents = opened.contents
    files = contents.files | {name: entry_of(archive.parent / "new")}
    (archive.parent / "new").unlink()
    return with_contents(archive, contents.model_copy(update={"files": files}), {name: data})


def with_contents(archive: Path, contents: Contents, more: Any = None) -> Path:
    bad = rewritten(archive, archive.with_name("bad.zip"), {**(more or {}), INDEX: contents.to_json().encode()})
    return bad.replace(archive)


def recipe(**build: Any) -> Recipe:
    return recipe_from({"model": {"name": "m"}, "data": {"source": "digits"}, "build": BUILD | build}, "test")


def codes_of(model: Path) -> dict[str, CodedTensor]:
    stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in load(model).graph.initializer}
    found = {}
    for name, pattern in (("c.weight", (2, 4)), ("f.weight", None)):
        codes = numpy_helper.to_array(stored[f"{name}.codes"]).astype(np.int8)
        scale = numpy_helper.to_array(stored[f"{name}.scale"]).reshape(-1).copy()
        found[name] = CodedTensor(codes=codes, scale=scale, bits=4, axis=0, pattern=pattern)
    return found
