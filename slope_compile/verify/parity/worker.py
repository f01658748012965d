"""The process in which an engine runs: one engine, some feeds, then it ends.

Polygraphy chooses between TensorRT and TensorRT-RTX once per process, and an engine that crashes must fail its check,
not the verification. The standard input brings one line of JSON and the inputs as safetensors; the standard output
takes one line of JSON and the outputs. Whatever anybody prints goes to the standard error.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from slope_compile.errors import BackendError
from slope_compile.targets.backends import BACKENDS, select_in_polygraphy


def main() -> None:
    """Read a request, run the engine, answer."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C++ code that prints to the standard output must not write into the answer
    request = json.loads(sys.stdin.buffer.readline())
    head: dict[str, str] = {}
    body = b""
    try:
        engine = _proved(Path(request["engine"]), request["sha256"])
        body = _run(engine, request["backend"], request["feeds"], sys.stdin.buffer.read())
    except OSError as error:  # libcudart, which Polygraphy copies with
        head = {"not_checked": f"the CUDA runtime is not usable here: {error}"}
    except BackendError as error:
        head = {"problem": error.problem}
    with answer:
        answer.write(json.dumps(head).encode() + b"\n" + body)


def _proved(path: Path, sha256: str | None) -> bytes:
    """Return the bytes of an engine, read once: these are hashed and loaded.

    Raises:
        BackendError: If they are not those that were trusted.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BackendError(f"{path.name} cannot be read: {error}.", "Build it again.") from None
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256:
        raise BackendError(
            f"{path.name} is refused, not loaded: it changed while it was verified; its sha256 is {found[:12]}…, "
            f"the manifest says {sha256[:12]}….",
            "Build it again.",
        )
    return data


def _run(engine: bytes, backend: str, feeds: int, inputs: bytes) -> bytes:
    trt = select_in_polygraphy(BACKENDS[backend])  # before anything else imports Polygraphy
    from polygraphy.exception import PolygraphyException

    from slope_compile.verify.chain.runners import infer
    from slope_compile.verify.parity.engine import unpack

    try:
        outputs = infer(_runner(trt, engine), unpack(load(inputs), feeds))
    except PolygraphyException as error:
        raise BackendError(f"The engine does not run: {error}", "Build it again.") from None
    tensors = {f"{index}.{name}": array for index, feed in enumerate(outputs) for name, array in feed.items()}
    return bytes(save(tensors))


def _runner(trt: Any, data: bytes) -> Any:
    """Return a Polygraphy runner over the engine.

    Polygraphy's own loader lets an engine bring host code along; this one leaves that off.
    """
    from polygraphy.backend.trt import TrtRunner, get_trt_logger

    runtime = trt.Runtime(get_trt_logger())
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise BackendError("The engine does not load: it is damaged, or of another version.", "Build it again.")
    return TrtRunner(engine, name="engine")
