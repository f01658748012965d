"""The header of an engine's layers.json against what it speaks of: the two ONNX files, the engine's bytes, the target.

Not checked, for no file tells it: the backend's version, `precision_reason`, the notes, and the values of the options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from slope_compile.artifacts import FileDigest
from slope_compile.build.engine import batch_profile
from slope_compile.build.header import KEYS
from slope_compile.errors import SlopeCompileError
from slope_compile.placement.rules import SPARSE
from slope_compile.qdq.tensors import load_graph
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.options import Options
from slope_compile.targets.target import find_target
from slope_compile.verify.parity.allowed import half_tensors

PRECISION = "precision"  # not among KEYS: nothing that runs an engine reads it
_IN_FLOAT = ("int8-weight", "int4-storage", "sparse-fp16")  # placements whose product is one of activations' type


def header_problems(
    header: Mapping[str, Any],
    engine: Path,
    onnx: Path,
    placed: Path | None,
    target: str | None,
    placements: Iterable[str],
) -> Iterator[str]:
    """Yield what a header says that is not so.

    Args:
        header: `header` of layers.json.
        engine: The engine.
        onnx: The exported file.
        placed: The file that the backend got, if it is there.
        target: For which target the engine is to be, if the caller knows.
        placements: Of the layers.

    Raises:
        KeyError, TypeError, ValueError: If it is no header of ours.
    """
    if missing := [key for key in (*KEYS, PRECISION) if key not in header]:
        yield f"the header lacks {', '.join(missing)}"
        return
    if header["backend"] not in BACKENDS:
        yield f"the header names the backend {header['backend']!r}"
    digest = FileDigest.of(engine)
    known: dict[str, Any] = {
        "onnx_sha256": FileDigest.of(onnx).sha256,
        "engine_sha256": digest.sha256,
        "engine_bytes": digest.size,
        "sparse_weights": any(placement in SPARSE for placement in placements),
    }
    if target is not None:
        known["target"] = target
    for key, value in known.items():
        if header[key] != value:
            yield f"{key} is {header[key]!r}; the files say {value!r}"
    yield from _target_problems(header)
    yield from _profile_problems(header["profile"], onnx)
    if placed is not None:
        yield from _precision_problems(header[PRECISION], placed, placements)
    if set(header["options"]) != set(Options().as_dict()):
        yield f"the header names the options {sorted(header['options'])}"


def _target_problems(header: Mapping[str, Any]) -> Iterator[str]:
    try:
        sm = "{}.{}".format(*find_target(header["target"]).sm)
    except SlopeCompileError as error:
        yield f"the header: {error.problem}"
        return
    if header["sm"] != sm:
        yield f"sm is {header['sm']!r}; {header['target']} has {sm}"


def _profile_problems(profile: Mapping[str, Mapping[str, Any]], onnx: Path) -> Iterator[str]:
    """Yield where the profile's shapes are not the model's inputs with one batch for all."""
    asked = {tuple(int(shapes[key][0]) for key in ("min", "opt", "max")) for shapes in profile.values()}
    if len(asked) > 1 or any(not 1 <= low <= opt <= high for low, opt, high in asked):
        yield f"the profile has the batches {sorted(asked)} (min, opt, max)"
        return
    smallest, opt, largest = next(iter(asked), (1, 1, 1))
    try:
        found = batch_profile(load_graph(onnx).graph, (smallest, opt, largest))
    except SlopeCompileError as error:
        yield error.problem
        return
    expected = {name: dict(zip(("min", "opt", "max"), shapes, strict=True)) for name, shapes in found.items()}
    if profile != expected:
        yield f"the profile is {dict(profile)}; with its batches the model's is {expected}"


def _precision_problems(precision: Any, placed: Path, placements: Iterable[str]) -> Iterator[str]:
    found, tensors = half_tensors(placed)
    # Where every product is one of INT8, nothing need be in half precision, whatever was asked for.
    if precision != found and (found != "fp32" or any(placement in _IN_FLOAT for placement in placements)):
        yield f"precision is {precision!r}; {tensors} tensors of {placed.name} are in half precision: {found}"
