"""What an engine was built by and for: written beside it, and asked before anything is deserialized.

An engine is code. Deserialize one only if its sha256 is in the run's manifest and `check_engine` lets it pass. The one
exception is an engine that was built from an .onnx file, in no run: `bench` takes the sha256 in the .layers.json beside
it. Both files from the same untrusted hand prove nothing: measure only engines that you built.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from slope_compile.errors import ArtifactError, BackendError
from slope_compile.targets.backends import BACKENDS
from slope_compile.targets.gpu import Gpu
from slope_compile.targets.options import Options
from slope_compile.targets.refusals import AMPERE

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
    "options",
)


def check_engine(header: Mapping[str, Any], gpu: Gpu) -> None:
    """Raise unless the engine was made by the version that is installed, for the GPU that is here.

    Args:
        header: `header` of the build's layers.json.
        gpu: The GPU that would run it.

    Raises:
        ArtifactError: If the header is none of ours.
        BackendError: If the backend is not installed or has another version, the GPU has another compute capability, or
            the engine is one that this program does not run: without weights, or with a runtime of its own.
    """
    missing = [key for key in KEYS if key not in header]
    if missing or header["backend"] not in BACKENDS:
        what = f"lacks {', '.join(missing)}" if missing else f"names the backend {header['backend']!r}"
        raise ArtifactError(f"The engine's layers.json {what}.", "Build the engine again.")
    if not isinstance(header["options"], dict) or set(header["options"]) != set(Options().as_dict()):
        raise ArtifactError(f"The engine's layers.json names the options {header['options']!r}.", "Build it again.")
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
    options = header["options"]
    if options["strip"]:
        raise BackendError("The engine was built without its weights (build.strip).", "Refit it before it runs.")
    if options["version_compatible"]:  # TensorRT loads that runtime as host code, and only if it is told to
        raise BackendError(
            "The engine brings a runtime of its own (build.version_compatible), and such code is not loaded here.",
            "Verify an engine built without that key.",
        )
    compatible = options["hardware_compatibility"] == "ampere-plus" and gpu.sm >= AMPERE
    if header["sm"] != f"{gpu.sm[0]}.{gpu.sm[1]}" and not compatible:
        raise BackendError(
            f"The engine was built for SM {header['sm']} ({header['target']}); the GPU here is {gpu}.",
            "Name the target of this GPU when you build, or verify on a machine with that one.",
        )
