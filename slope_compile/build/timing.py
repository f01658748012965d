"""The timing cache: what TensorRT measured of its kernels, kept beside an engine and used by the next build.

timing.cache is TensorRT's own file; timing.json beside it says whose measurements they are. A cache of another GPU,
backend or version tells nothing about this one, so it is refused where it was asked for and left out where it was not.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from slope_compile.artifacts import read_json
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.targets.backends import Backend
from slope_compile.targets.gpu import Gpu

CACHE, OWNER = "timing.cache", "timing.json"
MOST_BYTES = 2**30


def starting_cache(
    asked: str | None, last: Path | None, backend: Backend, version: str, gpu: Gpu | None, events: Events
) -> bytes:
    """Return the timing cache that a build starts from; empty: none.

    Args:
        asked: The recipe's `build.timing_cache`.
        last: Folder of the last build for the target.
        backend: Who builds.
        version: Its version.
        gpu: The GPU of this machine.
        events: Who is told that the last build's cache is used, or why it is not.

    Raises:
        ArtifactError: If the cache that was asked for is missing, changed, or of another GPU, backend or version.
    """
    if not backend.timing_cache:
        return b""  # `require_possible` refused one that was asked for
    here = _owner(backend, version, gpu)
    if asked is not None:
        found = _read(Path(asked))
        if isinstance(found, bytes):
            reason = _unlike(Path(asked), found, here)
            if reason is None:
                return found
        else:
            reason = found
        raise ArtifactError(
            f"The timing cache {asked} cannot be used: {reason}.",
            "Leave out `build.timing_cache`, or name one that a build with this backend and version left on this GPU.",
        )
    if last is None or not (last / CACHE).is_file():
        return b""
    found = _read(last / CACHE)
    reason = _unlike(last / CACHE, found, here, needs_owner=True) if isinstance(found, bytes) else found
    events.note(
        "build", f"the last build's timing cache is {'used again' if reason is None else f'not used: {reason}'}"
    )
    return found if isinstance(found, bytes) and reason is None else b""


def keep_cache(cache: bytes, out: Path, backend: Backend, version: str, gpu: Gpu | None) -> None:
    """Write timing.cache and timing.json into the folder of a build; nothing where the backend has no cache.

    Args:
        cache: As the backend serialized it.
        out: The folder.
        backend: Who built.
        version: Its version.
        gpu: The GPU of this machine.
    """
    if not cache:
        return
    (out / CACHE).write_bytes(cache)
    owner = _owner(backend, version, gpu) | {"sha256": hashlib.sha256(cache).hexdigest(), "bytes": len(cache)}
    (out / OWNER).write_text(json.dumps(owner, indent=1) + "\n", encoding="utf-8")


def _owner(backend: Backend, version: str, gpu: Gpu | None) -> dict[str, Any]:
    return {"backend": backend.name, "version": version, "gpu": str(gpu) if gpu else "none"}


def _read(path: Path) -> bytes | str:
    """Return a cache's bytes, or why there are none."""
    try:
        size = path.stat().st_size
        if not path.is_file() or not 0 < size <= MOST_BYTES:
            return f"it is no file of 1 to {MOST_BYTES} bytes"
        return path.read_bytes()
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _unlike(path: Path, cache: bytes, here: dict[str, Any], needs_owner: bool = False) -> str | None:
    """Say in what a cache differs from one made here, or None. Where nothing beside it says so, TensorRT is asked."""
    owner_path = path.with_suffix(".json")
    if not owner_path.is_file():
        return f"{owner_path.name}, which says where it was measured, is missing" if needs_owner else None
    try:
        owner = read_json(owner_path)
        differing = [f"{key} is {owner[key]}, not {here[key]}" for key in here if owner[key] != here[key]]
        damaged = owner["sha256"] != hashlib.sha256(cache).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{owner_path.name} beside it cannot be read: {error}"
    if damaged:
        return f"its sha256 is not the one in {owner_path.name}: it was changed, or cut"
    return f"it was measured elsewhere: {'; '.join(differing)}" if differing else None
