"""The process in which TensorRT works: one build, then it ends.

A process of its own, because Polygraphy and TensorRT decide things once per process (which of the two TensorRTs, one
logger for all builders), because TensorRT's libraries print where they like, and because a builder that crashes should
fail one build. The standard input brings the request, one line of JSON, then the bytes of the timing cache to start
from. The standard output takes the answer: one line of JSON, then the engine's bytes, the timing cache's and the
engine inspector's JSON. What anybody prints goes to the standard error: the build log.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from slope_compile.build.addresses import LIBRARIES, USE, load_libraries, place_below
from slope_compile.errors import BackendError
from slope_compile.targets.backends import BACKENDS, Backend, select_in_polygraphy
from slope_compile.targets.options import Options

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
        options: Settings of the builder.
    """

    backend: str
    onnx: str
    sm: tuple[int, int]
    profile: Shapes
    sparse: bool
    options: Options = field(default_factory=Options)

    def to_json(self) -> str:
        """Return the form that goes through the pipe: one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Request:
        """Return the request that `to_json` wrote."""
        read = json.loads(text)
        return cls(**{**read, "sm": tuple(read["sm"]), "options": Options(**read["options"])})


@dataclass(frozen=True)
class Built:
    """What a build made.

    Args:
        engine: The serialized engine.
        cache: The timing cache; empty where the backend has none.
        version: The backend's version.
        inspector: What the engine inspector says of the engine, JSON; empty where nothing can load it.
    """

    engine: bytes
    cache: bytes
    version: str
    inspector: str = ""

    def to_answer(self) -> bytes:
        """Return the form that goes through the pipe."""
        parts = (self.engine, self.cache, self.inspector.encode())
        return (
            json.dumps({"version": self.version, "parts": [len(part) for part in parts]}).encode()
            + b"\n"
            + b"".join(parts)
        )

    @classmethod
    def from_answer(cls, head: Mapping[str, Any], body: bytes) -> Built:
        """Return what `to_answer` wrote, its first line read as JSON.

        Raises:
            RuntimeError: If bytes are missing or left over.
        """
        if len(body) != sum(head["parts"]):
            raise RuntimeError(f"the build process sent {len(body)} bytes, not {sum(head['parts'])}")
        first, second = head["parts"][0], head["parts"][0] + head["parts"][1]
        return cls(body[:first], body[first:second], head["version"], body[second:].decode(errors="replace"))


def main() -> None:
    """Read a request, build, answer."""
    answer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # C++ code that prints to the standard output must not write into the answer
    _end_with_parent()
    request = Request.from_json(sys.stdin.buffer.readline())
    cache = sys.stdin.buffer.read()
    try:
        backend = BACKENDS[request.backend]
        with ThreadPoolExecutor(max_workers=1) as thread:
            place_below(LIBRARIES)
            thread.submit(load_libraries, f"{backend.module}_libs").result()
            trt = select_in_polygraphy(backend)
            place_below(USE)
            sent = thread.submit(build, request, backend, trt, cache).result().to_answer()
    except BackendError as error:
        sent = json.dumps({"problem": error.problem, "remedy": error.remedy}).encode() + b"\n"
    with answer:
        answer.write(sent)


def _end_with_parent() -> None:
    """Ask Linux to end this process with its parent: a killed command must leave no builder behind."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent ended before the build began")


def build(request: Request, backend: Backend, trt: Any, cache: bytes) -> Built:
    """Build with the backend's module, which Polygraphy uses too.

    Args:
        request: What to build.
        backend: With what.
        trt: The backend's module.
        cache: The timing cache to start from; empty: none.

    Raises:
        BackendError: If the backend refuses the model, the timing cache or a setting.
    """
    from polygraphy.backend.trt import CreateNetwork, EngineBytesFromNetwork
    from polygraphy.backend.trt import util as polygraphy_trt
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    G_LOGGER.severity = G_LOGGER.VERBOSE
    logger = polygraphy_trt.TRT_LOGGER = make_logger(trt)
    version = str(trt.__version__)
    try:
        builder, network = CreateNetwork(**backend.network_arguments(version))()
        parser = trt.OnnxParser(network, logger)
        # Polygraphy's NetworkFromOnnxPath drops the parser, and with it node and operator of an error.
        if not parser.parse_from_file(request.onnx):
            raise parse_error(backend, [parser.get_error(index) for index in range(parser.num_errors)])
        config = make_config(request, backend, trt, builder, network)
        if cache:
            start_from(cache, config, backend, version, logger.errors)
        engine = bytes(EngineBytesFromNetwork((builder, network, parser), config)())
        timing = bytes(config.get_timing_cache().serialize()) if backend.timing_cache else b""
    except PolygraphyException as error:
        reason = " ".join(logger.errors[-REASON_LINES:]) or str(error)
        raise BackendError(
            f"{backend.title} {version} could not build the engine: {reason}",
            "Leave the layer it names in float with `compression.overrides`, or see build.log.",
        ) from None
    return Built(engine, timing, version, inspect(engine, request, backend, trt, logger))


def make_config(request: Request, backend: Backend, trt: Any, builder: Any, network: Any) -> Any:
    """Return the builder's config for a request.

    Args:
        request: What to build.
        backend: With what.
        trt: The backend's module.
        builder: Its builder.
        network: The network that the profile is for.
    """
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, shapes in request.profile.items():
        profile.add(name, *map(tuple, shapes))
    arguments = backend.config_arguments(trt, request.sm, request.sparse, request.options)
    if backend.rtx:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        config = CreateConfigRTX(profiles=[profile], **arguments)(builder, network)
    else:
        config = CreateConfig(profiles=[profile], **arguments)(builder, network)
    for flag in backend.more_flags(request.options):
        config.set_flag(getattr(trt.BuilderFlag, flag))
    if (
        request.options.dla is not None
    ):  # Polygraphy would take core 0, and prefer precisions in a strongly typed network
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = request.options.dla
    return config


def start_from(cache: bytes, config: Any, backend: Backend, version: str, errors: list[str]) -> None:
    """Give a config a timing cache; Polygraphy would go on without one that is refused.

    Args:
        cache: The serialized cache.
        config: The builder's config.
        backend: Who builds.
        version: Its version.
        errors: What the backend said until now.

    Raises:
        BackendError: If the backend does not take it.
    """
    timing = config.create_timing_cache(cache)
    if timing is None or not config.set_timing_cache(timing, False):
        reason = errors[-1] if errors else "it does not say why."
        raise BackendError(
            f"{backend.title} {version} refuses the timing cache: {reason}",
            "Leave out `build.timing_cache`, or name one made by this version on this GPU.",
        )


def inspect(engine: bytes, request: Request, backend: Backend, trt: Any, logger: Any) -> str:
    """Return the engine inspector's JSON; empty for an engine that this machine does not run, or without weights.

    Args:
        engine: The engine just built.
        request: What was asked for.
        backend: Who built it.
        trt: Its module.
        logger: Its logger.

    Raises:
        BackendError: If the backend does not load what it built here.
    """
    if not backend.needs_gpu or request.options.strip:
        return ""
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = request.options.version_compatible  # its own lean runtime, built a moment ago
    loaded = runtime.deserialize_cuda_engine(engine)
    if loaded is None:
        reason = " ".join(logger.errors[-REASON_LINES:])
        raise BackendError(f"{backend.title} does not load the engine that it built: {reason}", "See build.log.")
    return str(loaded.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))


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
