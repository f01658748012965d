"""What an engine was built by and for: written beside it, and asked before anything is deserialized.

An engine is code. Deserialize one only if its sha256 is in the run's manifest and `check_engine` lets it pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from slope_compile.errors import ArtifactError, BackendError
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.gpu import Gpu

KEYS = (
    "backend",
    "version",
    "target",
    "sm",
    "profile",
    "onnx_sha256",
    "engine_sha256",
    "engine_bytes",
    "sparse_weights",
)


def check_engine(header: Mapping[str, Any], gpu: Gpu) -> None:
    """Raise unless the engine was made by the version that is installed, for the GPU that is here.

    Args:
        header: `header` of the build's layers.json.
        gpu: The GPU that would run it.

    Raises:
        ArtifactError: If the header is none of ours.
        BackendError: If the backend is not installed or has another version, or the GPU has another compute capability.
    """
    missing = [key for key in KEYS if key not in header]
    if missing or header["backend"] not in BACKENDS:
        what = f"lacks {', '.join(missing)}" if missing else f"names the backend {header['backend']!r}"
        raise ArtifactError(f"The engine's layers.json {what}.", "Build the engine again.")
    backend = BACKENDS[header["backend"]]
    again = f"Build it again on this machine with `slope-compile build … --target {header['target']}`."
    if not backend.installed():
        raise BackendError(f"The engine was built by {backend.title}, which is not installed.", backend.remedy)
    try:
        here = str(importlib.import_module(backend.module).__version__)
    except (ImportError, OSError) as error:
        raise BackendError(f"{backend.title} is installed but does not import: {error}.", backend.remedy) from None
    if here != header["version"]:
        raise BackendError(
            f"The engine was built by {backend.title} {header['version']}, and {here} is installed.",
            again,
        )
    if header["sm"] != f"{gpu.sm[0]}.{gpu.sm[1]}":
        raise BackendError(
            f"The engine was built for SM {header['sm']} ({header['target']}); the GPU here is {gpu}.",
            "Name the target of this GPU when you build, or verify on a machine with that one.",
        )
