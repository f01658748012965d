"""An engine from an ONNX file that belongs to no run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from slope_compile.artifacts import storage_errors, sync
from slope_compile.build.engine import build_engine
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.recipe import BatchRange

COMPANIONS = {"model.engine": "", "layers.json": ".layers.json", "build.log": ".log", "timing.cache": ".timing.cache"}


def build(
    onnx: str | Path,
    target: str = "a100",
    out: str | Path | None = None,
    backend: str = "auto",
    batch: BatchRange | None = None,
    events: Events | None = None,
) -> dict[str, Any]:
    """Build an engine from an ONNX file; the layer list and the log are written beside it.

    Args:
        onnx: The model; only its batch axis may be dynamic.
        target: Name of the target device.
        out: The engine file; default: the model's name with the target and `.engine`.
        backend: `auto`, `tensorrt` or `tensorrt-rtx`.
        batch: Batch sizes of the optimization profile.
        events: Who is told.

    Returns:
        What OUT.layers.json holds: `header`, `summary`, `layers`.

    Raises:
        BackendError: If the backend cannot build it for the target here.
        ArtifactError: If the model is missing or damaged.
        StorageError: If the engine cannot be written.
    """
    source = Path(onnx)
    if not source.is_file():
        raise ArtifactError(f"{source} does not exist.", "Name an .onnx file or a run folder.")
    engine = Path(out) if out else source.with_suffix(f".{target}.engine")
    with storage_errors(engine), tempfile.TemporaryDirectory(prefix=f".{engine.name}.", dir=engine.parent) as work:
        result = build_engine(source, target, backend, batch or BatchRange(), Path(work), events or Events())
        for made, suffix in reversed(COMPANIONS.items()):  # the engine last: where it is, its layer list is too
            if (Path(work) / made).exists():
                sync(Path(work) / made)
                (Path(work) / made).replace(engine.with_name(engine.name + suffix))
    return result
