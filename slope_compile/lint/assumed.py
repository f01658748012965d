"""For whom a file is judged before anything is built, whether its TensorRT is installed here or not."""

from __future__ import annotations

from pathlib import Path

from slope_compile.errors import BackendError, nearest
from slope_compile.placement.situation import Situation, situation_of
from slope_compile.recipe import BuildSection
from slope_compile.targets.backends import BACKENDS, Backend
from slope_compile.targets.refusals import require_possible
from slope_compile.targets.target import Target, find_target
from slope_compile.targets.versions import parse_version

NEWEST = {"tensorrt": "11.4.1", "tensorrt-rtx": "1.7.1"}  # releases that targets.yaml and the rules were written for


def assumed_situation(onnx: Path, section: BuildSection, target: str, backend: str) -> Situation:
    """Return the situation of a build that is yet to come, somewhere.

    Args:
        onnx: The model.
        section: Precision, batch and overrides.
        target: Name of the target.
        backend: Name of the backend, which need not be installed.

    Raises:
        BackendError: If there is no such target or backend, or the one cannot build for the other.
        ArtifactError: If the model cannot be read.
    """
    aim = find_target(target)
    if backend not in BACKENDS:
        raise BackendError(f"There is no backend '{backend}'.", nearest(backend, BACKENDS))
    chosen = BACKENDS[backend]
    version = assumed_version(aim, chosen)
    require_possible(section, aim, chosen, version)
    return situation_of(section, aim, chosen, version, onnx)


def assumed_version(target: Target, backend: Backend) -> str:
    """Return the version that a target has most likely: on a device the first that runs there, as bundles assume too.

    Elsewhere the newest that runs on it; of a range whose end is unknown, its beginning.
    """
    newest = NEWEST[backend.name]
    if target.on_device and not backend.rtx:
        return target.tensorrt[0].first
    if backend.rtx or target.system_of(newest) is not None or not target.tensorrt:
        return newest
    return max((row.first for row in target.tensorrt), key=parse_version)
