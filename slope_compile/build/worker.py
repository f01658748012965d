"""The process in which TensorRT works: one build, then it ends.

A process of its own, because Polygraphy and TensorRT decide things once per process (which of the two TensorRTs, one
logger for all builders), because TensorRT's libraries print where they like, and because a builder that crashes should
fail one build. The standard input brings the request as JSON. The standard output takes the answer: one line of JSON,
then the engine's bytes, then the timing cache's. What anybody prints goes to the standard error: the build log.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from slope_compile.build.addresses import LIBRARIES, USE, load_libraries, place_below
from slope_compile.errors import BackendError
from slope_compile.targets.backends import BACKENDS, Backend, select_in_polygraphy

PR_SET_PDEATHSIG = 1
REASON_LINES = 3
Shapes = dict[str, tuple[list[int], list[int], list[int]]]  # input -> (min, opt, max)


@dataclass(frozen=True)
class Request:
    """What to build.

    Args:
        backend: A name in the table.
        onnx: Path of the model.
        sm: Compute capability, (major, minor).
        profile: Input name -> (min, opt, max) shapes; inputs without dynamic axes are left out.
        sparse: Whether sparse kernels may be chosen.
    """

    backend: str
    onnx: str
    sm: tuple[int, int]
    profile: Shapes
    sparse: bool

    def to_json(self) -> str:
        """Return the form that goes through the pipe."""
        return json.dumps(asdict(self))


def main() -> None:
    """Read a request, build, answer."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C++ code that prints to the standard output must not write into the answer
    _end_with_parent()
    request = Request(**json.load(sys.stdin))
    header: dict[str, Any]
    engine = cache = b""
    try:
        backend = BACKENDS[request.backend]
        with ThreadPoolExecutor(max_workers=1) as thread:
            place_below(LIBRARIES)
            thread.submit(load_libraries, f"{backend.module}_libs").result()
            trt = select_in_polygraphy(backend)
            place_below(USE)
            engine, cache, version = thread.submit(_build, request, backend, trt).result()
        header = {"engine": len(engine), "timing_cache": len(cache), "version": version}
    except BackendError as error:
        header = {"problem": error.problem, "remedy": error.remedy}
    with answer:
        answer.write(json.dumps(header).encode() + b"\n" + engine + cache)


def _end_with_parent() -> None:
    """Ask Linux to end this process with its parent: a killed command must leave no builder behind."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent ended before the build began")


def _build(request: Request, backend: Backend, trt: Any) -> tuple[bytes, bytes, str]:
    """Return engine, timing cache (empty where the backend has none) and the backend's version."""
    from polygraphy.backend.trt import CreateConfig, CreateNetwork, EngineBytesFromNetwork, Profile
    from polygraphy.backend.trt import util as polygraphy_trt
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.VERBOSE
    logger = polygraphy_trt.TRT_LOGGER = make_logger(trt)
    profile = Profile()
    for name, shapes in request.profile.items():
        profile.add(name, *map(tuple, shapes))
    arguments = backend.config_arguments((request.sm[0], request.sm[1]), request.sparse)
    try:
        builder, network = CreateNetwork(**backend.network_arguments(trt.__version__))()
        parser = trt.OnnxParser(network, logger)
        # Polygraphy's NetworkFromOnnxPath drops the parser, and with it node and operator of an error.
        if not parser.parse_from_file(request.onnx):
            raise parse_error(backend, [parser.get_error(index) for index in range(parser.num_errors)])
        if backend.rtx:
            from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

            create_config = CreateConfigRTX(profiles=[profile], **arguments)
        else:
            create_config = CreateConfig(profiles=[profile], **arguments)
        config = create_config(builder, network)
        engine = bytes(EngineBytesFromNetwork((builder, network, parser), config)())
        cache = bytes(config.get_timing_cache().serialize()) if backend.timing_cache else b""
    except PolygraphyException as error:
        reason = " ".join(logger.errors[-REASON_LINES:]) or str(error)
        raise BackendError(
            f"{backend.title} {trt.__version__} could not build the engine: {reason}",
            "Leave the layer it names in float with `compression.overrides`, or see build.log.",
        ) from None
    return engine, cache, str(trt.__version__)


def make_logger(trt: Any) -> Any:
    """Return a TensorRT logger that writes every message to the standard error and keeps the errors."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            sys.stderr.write(f"{severity.name}: {message}\n")
            if severity.name in ("ERROR", "INTERNAL_ERROR") and (text := clean_reason(message)):
                self.errors.append(text)

    return Logger()


def parse_error(backend: Backend, errors: list[Any]) -> BackendError:
    """Return the error for what a parser refused.

    Args:
        backend: Whose parser it was.
        errors: trt.ParserError, the first one is told.
    """
    if not errors:
        return BackendError(f"{backend.title} cannot read the model, and does not say why.", "See build.log.")
    error = errors[0]
    where = f"node '{error.node_name()}' ({error.node_operator()})" if error.node_operator() else "an initializer"
    more = f" ({len(errors) - 1} more in build.log)" if len(errors) > 1 else ""
    return BackendError(
        f"{backend.title} cannot parse {where} of the model: {clean_reason(error.desc())}{more}",
        "Change that node in the model, or leave its layer in float with `compression.overrides`.",
    )


def clean_reason(text: str) -> str:
    """Return TensorRT's message without source positions, and without the CUDA error that follows where no GPU is."""
    lines = [line for line in text.splitlines() if "catchCudaError" not in line and not line.startswith("Invalid Node")]
    joined = re.sub(r"\s+In [\w:~()]+ at /_src/[^\s)]+", "", " ".join(" ".join(lines).split()))
    return joined if not joined or joined.endswith((".", "!")) else f"{joined}."


if __name__ == "__main__":
    main()
