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
ENDS = ("min", "opt", "max")
MODELS = ("export/model.onnx", "bundle/model.onnx")  # in a run's folder, in a bundle's


@dataclass(frozen=True)
class Subject:
    """An engine of ours.

    Args:
        engine: The file; its sha256 is the one that its build wrote down.
        header: `header` of its layers.json.
        onnx: The model that it was built from, None where it is not known.
    """

    engine: Path
    header: Mapping[str, Any]
    onnx: Path | None

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

    Args:
        engine: The file.
        onnx: The exported model; default: the run's, where the engine is in a run.

    Raises:
        ArtifactError: If it is missing, not the one that its build wrote down, or the model is another one.
    """
    if not engine.is_file():
        what = "is a folder" if engine.is_dir() else "does not exist"
        raise ArtifactError(f"{engine} {what}.", REMEDY)
    layers = engine.with_name(f"{engine.name}.layers.json")
    in_run = not layers.is_file() and (engine.parent / "layers.json").is_file()
    layers = engine.parent / "layers.json" if in_run else layers
    header = _header(layers)
    if FileDigest.of(engine).sha256 != header["engine_sha256"]:
        raise ArtifactError(f"{engine} is not the engine that {layers.name} describes: it is not loaded.", REMEDY)
    if in_run:
        run = engine.resolve().parents[2]
        stage = f"build/{engine.resolve().parent.name}"
        RunFolder.existing(run).require(stage)  # an engine is code: its sha256 must be in the manifest
        onnx = onnx or next((path for path in (run / name for name in MODELS) if path.is_file()), None)
    if onnx is not None and (not onnx.is_file() or FileDigest.of(onnx).sha256 != header["onnx_sha256"]):
        what = "is not the file that the engine was built from" if onnx.is_file() else "does not exist"
        raise ArtifactError(f"{onnx} {what}.", "Name the exported model with --onnx, or build the engine again.")
    return Subject(engine, header, onnx)


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
