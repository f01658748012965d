"""An engine from an ONNX file that belongs to no run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from slope_compile.artifacts import storage_errors, sync
from slope_compile.build.engine import build_engine
from slope_compile.errors import ArtifactError, StorageError
from slope_compile.events import Events
from slope_compile.recipe import build_section

TENSORS = "placed.data"  # of a placed.onnx over 1 GiB
COMPANIONS = {
    "model.engine": "",
    "placed.onnx": ".placed.onnx",
    TENSORS: ".placed.data",
    "layers.json": ".layers.json",
    "build.log": ".log",
    "timing.cache": ".timing.cache",
    "timing.json": ".timing.json",
}


def build(
    onnx: str | Path,
    target: str = "a100",
    out: str | Path | None = None,
    events: Events | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """Build an engine from an ONNX file; the layer list, the log and the file it was built from are written beside it.

    Args:
        onnx: The model; only its batch axis may be dynamic.
        target: Name of the target device.
        out: The engine file; default: the model's name with the target and `.engine`.
        events: Who is told.
        keys: Keys of a recipe's `build` but for `targets`, such as `backend="tensorrt-rtx"`, `batch={"max": 8}`.

    Returns:
        What OUT.layers.json holds: `header`, `summary`, `layers`.

    Raises:
        RecipeError: If there is no such key, or not with that value.
        BackendError: If the backend cannot build it for the target here.
        ArtifactError: If the model is missing or damaged.
        StorageError: If the engine cannot be written.
    """
    source = Path(onnx)
    if not source.is_file():
        raise ArtifactError(f"{source} does not exist.", "Name an .onnx file or a run folder.")
    section = build_section(keys, (), str(source))
    engine = engine_path(source, target, out)
    if not engine.parent.is_dir():
        raise StorageError(f"There is no folder {engine.parent} to write {engine.name} into.", "Make it first.")
    with storage_errors(engine), tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as work:
        result = build_engine(source, target, section, Path(work), events or Events())
        _rename_tensors(Path(work), f"{engine.name}{COMPANIONS[TENSORS]}")
        for made, suffix in reversed(COMPANIONS.items()):  # the engine last: where it is, its layer list is too
            if (Path(work) / made).exists():
                sync(Path(work) / made)
                (Path(work) / made).replace(engine.with_name(engine.name + suffix))
    return result


def engine_path(onnx: Path, target: str, out: str | Path | None) -> Path:
    """Return where `build` writes the engine.

    Args:
        onnx: The model.
        target: Name of the target device.
        out: As asked for, None for the default.
    """
    return Path(out) if out else onnx.with_suffix(f".{target}.engine")


def _rename_tensors(work: Path, name: str) -> None:
    """Let placed.onnx look for its tensors under the name that they get beside the engine."""
    if not (work / TENSORS).exists():
        return
    import onnx_ir as ir

    placed = work / "placed.onnx"
    ir.save(ir.load(placed), work / "renamed.onnx", external_data=name)
    (work / "renamed.onnx").replace(placed)
    (work / name).replace(work / TENSORS)
