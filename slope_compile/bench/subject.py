"""What is to be measured: an engine file, what its build wrote down about it, and the model that it was built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_compile.artifacts import FileDigest, RunFolder, read_json
from slope_compile.build.header import KEYS
from slope_compile.errors import ArtifactError

REMEDY = "Name an engine that `slope-compile build` wrote: RUN/build/TARGET/model.engine, or one with its .layers.json."
UNKNOWN = "It is not known from which ONNX file the engine was built."
ENDS = ("min", "opt", "max")
MODELS = ("export/model.onnx", "bundle/model.onnx")  # in a run's folder, in a bundle's


@dataclass(frozen=True)
class Subject:
    """An engine of ours.

    Args:
        engine: The file; its sha256 is the one that its build wrote down.
        header: `header` of its layers.json.
        onnx: The model that it was built from, None where it is not known.
        no_onnx: Why it is not.
    """

    engine: Path
    header: Mapping[str, Any]
    onnx: Path | None
    no_onnx: str = ""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Opt shape of every input with a dynamic batch."""
        return {name: list(profile["opt"]) for name, profile in self.header["profile"].items()}

    @property
    def batch(self) -> int:
        """Items of one inference; 1 where the batch is fixed in the model."""
        return next((shape[0] for shape in self.shapes.values() if shape), 1)


def find_subject(engine: Path, onnx: Path | None) -> Subject:
    """Return an engine and what is known about it.

    An engine is code. In a run's folder its sha256 must be in the manifest, whatever lies beside it; elsewhere the
    .layers.json beside it is all there is, and tells only that the two belong together.

    Args:
        engine: The file.
        onnx: The exported model; default: the run's, where the engine is in a run and was built from it.

    Raises:
        ArtifactError: If it is missing, not the one that its build wrote down, or the model given is another one.
    """
    if not engine.is_file():
        what = "is a folder" if engine.is_dir() else "does not exist"
        raise ArtifactError(f"{engine} {what}.", REMEDY)
    stage = engine.resolve().parent
    run = stage.parent.parent
    in_run = (run / "manifest.json").is_file()
    layers = stage / "layers.json" if in_run else engine.with_name(f"{engine.name}.layers.json")
    header, digest = _header(layers), FileDigest.of(engine)
    if digest.sha256 != header["engine_sha256"]:
        raise ArtifactError(f"{engine} is not the engine that {layers.name} describes: it is not loaded.", REMEDY)
    if in_run:
        name = stage.relative_to(run).as_posix()
        record = RunFolder.existing(run).require(name)
        if record.outputs.get(f"{name}/{engine.resolve().name}") != digest:
            raise ArtifactError(f"{engine} is not in the manifest of {run}: it is not loaded.", REMEDY)
    if onnx is not None:
        if not _is_source(onnx, header):
            what = "is not the file that the engine was built from" if onnx.is_file() else "does not exist"
            raise ArtifactError(f"{onnx} {what}.", "Name the exported model with --onnx, or build the engine again.")
        return Subject(engine, header, onnx)
    found = [path for path in (run / name for name in MODELS) if in_run and path.is_file()]
    if source := next((path for path in found if _is_source(path, header)), None):
        return Subject(engine, header, source)
    changed = " or ".join(str(path) for path in found)
    no_onnx = f"{changed} is not the file that the engine was built from." if found else UNKNOWN
    return Subject(engine, header, None, no_onnx)


def _is_source(onnx: Path, header: Mapping[str, Any]) -> bool:
    return onnx.is_file() and FileDigest.of(onnx).sha256 == header["onnx_sha256"]


def _header(layers: Path) -> dict[str, Any]:
    try:
        header = dict(read_json(layers)["header"])
        if missing := [key for key in KEYS if key not in header]:
            raise ValueError(f"its header lacks {', '.join(missing)}")
        shapes = [shape for profile in header["profile"].values() for shape in (profile[end] for end in ENDS)]
        if not all(shape and all(isinstance(extent, int) and extent > 0 for extent in shape) for shape in shapes):
            raise ValueError(f"{header['profile']} is no profile")
    except FileNotFoundError:
        raise ArtifactError(f"There is no {layers.name} beside the engine: nobody vouches for it.", REMEDY) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{layers} cannot be read: {error}.", "Build the engine again.") from None
    return header
