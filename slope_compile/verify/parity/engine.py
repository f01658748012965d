"""`parity.engine`: the TensorRT engine gives the outputs of ONNX Runtime, where its GPU and its runtime are here.

A device may have no ONNX Runtime: there the golden outputs stand in for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from slope_compile.artifacts import FileDigest, read_json
from slope_compile.build.header import check_engine as check_header
from slope_compile.child import ask
from slope_compile.errors import ArtifactError, BackendError
from slope_compile.targets.gpu import find_gpu
from slope_compile.verify.chain.runners import Arrays, infer_onnx
from slope_compile.verify.parity.outputs import Pair, compare, require_found, require_telling
from slope_compile.verify.parity.tolerance import Tolerance
from slope_compile.verify.verdict import Check, NotCheckedError, Once, significant

if TYPE_CHECKING:
    import onnxruntime as ort

NAME = "parity.engine"
REFUSED = (
    "refused, not loaded: its sha256 is not in the manifest, and an engine is code "
    "(--trust-engine loads it all the same)"
)
MAX_SMALLEST = 4096  # samples that a profile may ask for at least: a feed of fewer is repeated until it has them
_WORKER = "from slope_compile.verify.parity.worker import main; main()"


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine, and whether its bytes may be loaded.

    Args:
        path: The serialized engine.
        layers: The layers.json of its build, whose header says for what and from what it was built.
        trusted: Whether the caller found the file's sha256 in its own manifest, or was told to trust it. An engine is
            code: loading one that somebody else wrote runs what they wrote.
        sha256: Of the bytes that the manifest lists: no others are loaded. None where it does not list them, so for a
            trusted engine only if it was trusted unseen.
    """

    path: Path
    layers: Path
    trusted: bool
    sha256: str | None


def engine_under_test(path: Path, layers: Path, listed: FileDigest | None, trust: bool) -> EngineUnderTest:
    """Return an engine to test: trusted if it is the file that a manifest lists, or if the user says so.

    Args:
        path: The serialized engine.
        layers: The layers.json of its build.
        listed: What the manifest says of the file; None where it does not list it.
        trust: Whether the user trusts it whatever it is.
    """
    known = listed if listed is not None and path.is_file() and FileDigest.of(path) == listed else None
    return EngineUnderTest(path, layers, known is not None or trust, None if known is None else known.sha256)


def check_engine(
    engine: EngineUnderTest | None,
    onnx: Path,
    session: Once[ort.InferenceSession],
    tolerance: Once[Tolerance],
    feeds: Callable[[], Sequence[Arrays]],
    golden: Once[Pair] | None = None,
    ran: Callable[[list[Arrays]], None] | None = None,
) -> Check:
    """Compare the engine with ONNX Runtime without optimizations, through Polygraphy's TrtRunner.

    In this order: is there an engine, may it be loaded, was it built from this file, can it run here. So a refusal is
    told on every machine; it fails, for bytes that nobody vouches for are not what they should be.

    Args:
        engine: What to load, if anything was built.
        onnx: The file that the engine must have been built from.
        session: That file in ONNX Runtime, optimizations disabled.
        tolerance: What TF32 products allow.
        feeds: Gives the inputs, one mapping a feed; asked only where the engine can run.
        golden: What the trained model gave for its inputs: compared with where ONNX Runtime is not installed.
        ran: Told what the engine gave, one mapping a feed.
    """
    if engine is None:
        raise NotCheckedError("no engine was given")
    if not engine.path.is_file():
        return Check(NAME, "fail", f"{engine.path.name} is missing")
    if not engine.trusted:
        return Check(NAME, "fail", REFUSED, {"refused": True})
    header = read_header(engine.layers)
    if header.get("onnx_sha256") != FileDigest.of(onnx).sha256:
        return Check(NAME, "fail", f"{engine.path.name} was built from another file than this {onnx.name}")
    _require_runnable(header)
    inputs = feeds()
    if not inputs:
        raise NotCheckedError("no inputs were given")
    allowed = tolerance()
    require_telling(allowed)
    batches, expected, whose = _expected(session, golden, inputs, _batch_range(header))
    outputs = _run_engine(engine, header["backend"], batches)
    in_order = [{name: found[name] for name in wanted} for found, wanted in zip(outputs, expected, strict=True)]
    if ran is not None:
        ran(joined(in_order, inputs, *_batch_range(header)))
    found = compare(expected, in_order, allowed)
    require_found(found)
    figures = {"tolerance": significant(allowed.relative), "derivation": allowed.derivation, **found.figures()}
    measured = f"the engine's outputs are within {found.relative:.1e} of {whose}, allowed {allowed.relative:.1e}"
    return Check(NAME, "pass" if found.within else "fail", measured, figures)


def _expected(
    session: Once[ort.InferenceSession],
    golden: Once[Pair] | None,
    inputs: Sequence[Arrays],
    sizes: tuple[int, int | None],
) -> tuple[list[Arrays], list[Arrays], str]:
    """Return batches that the engine takes, what it should give for them, and who says so.

    Raises:
        NotCheckedError: If there is neither ONNX Runtime nor golden outputs.
    """
    try:
        run = session()
    except NotCheckedError as error:
        if golden is None:
            raise
        kept = golden()
        return split(kept.inputs, *sizes), split(kept.outputs, *sizes), f"the golden outputs ({error})"
    batches = [part for feed in inputs for part in split(feed, *sizes)]
    return batches, infer_onnx(run, batches, "onnxruntime"), "ONNX Runtime's"


def read_header(layers: Path) -> dict[str, Any]:
    """Return what `build` wrote down about an engine.

    Raises:
        ArtifactError: If layers.json is missing, too big, or not the build's.
    """
    try:
        return dict(read_json(layers)["header"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"The engine's {layers.name} cannot be read: {error}.", "Build it again.") from None


def split(feed: Arrays, smallest: int, largest: int | None) -> list[Arrays]:
    """Cut a feed into batches that the engine's profile allows.

    The last one may be too short: it is filled up with the feed's samples from the first on. Inputs and outputs that
    are cut alike are still each other's, so nothing is taken away again.

    Args:
        feed: Arrays of as many samples each.
        smallest: Samples that a batch has at least.
        largest: Samples that it has at most; None: any number.
    """
    count = next(iter(feed.values())).shape[0]
    step = largest or max(count, smallest)
    parts: list[Arrays] = []
    for start in range(0, count, step):
        stop = max(min(start + step, count), start + smallest)
        rows = slice(start, stop) if stop <= count else np.arange(start, stop) % count
        parts.append({name: array[rows] for name, array in feed.items()})
    return parts


def joined(parts: Sequence[Arrays], feeds: Sequence[Arrays], smallest: int, largest: int | None) -> list[Arrays]:
    """Return the outputs of whole feeds from those of the batches that `split` made of them, in order.

    Args:
        parts: Outputs, one mapping a batch; the last feeds may be missing.
        feeds: What was cut.
        smallest: As of `split`.
        largest: As of `split`.
    """
    whole: list[Arrays] = []
    waiting = list(parts)
    for feed in feeds:
        count, cut = next(iter(feed.values())).shape[0], len(split(feed, smallest, largest))
        mine, waiting = waiting[:cut], waiting[cut:]
        if len(mine) == cut:
            whole.append({name: np.concatenate([part[name] for part in mine])[:count] for name in mine[0]})
    return whole


def _require_runnable(header: Mapping[str, Any]) -> None:
    """Raise unless this machine can run the engine.

    Raises:
        NotCheckedError: With the reason.
        ArtifactError: If the header is none of ours.
    """
    gpu = find_gpu()
    built = f"the engine was built for SM {header.get('sm')} ({header.get('target')})"
    if gpu is None:
        raise NotCheckedError(f"{built}, and this machine has no NVIDIA GPU")
    try:
        check_header(header, gpu)
    except BackendError as error:
        raise NotCheckedError(error.problem) from None


def _batch_range(header: Mapping[str, Any]) -> tuple[int, int | None]:
    """Return how many samples the engine takes at least and at most; None: as many as there are.

    Raises:
        ArtifactError: If the header says what no engine of ours takes.
    """
    try:
        profiles = [(int(shapes["min"][0]), int(shapes["max"][0])) for shapes in header["profile"].values()]
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError):
        told = str(header.get("profile"))[:100]
        raise ArtifactError(f"The engine's header has the profile {told}.", "Build it again.") from None
    smallest = max((low for low, _ in profiles), default=1)
    largest = min((high for _, high in profiles), default=None)
    if not 1 <= smallest <= (MAX_SMALLEST if largest is None else min(largest, MAX_SMALLEST)):
        problem = f"The engine's header says that it takes {smallest} to {largest} samples at once"
        raise ArtifactError(f"{problem}; at least 1 to {MAX_SMALLEST} are possible.", "Build it again.")
    return smallest, largest


def _run_engine(engine: EngineUnderTest, backend: str, batches: Sequence[Arrays]) -> list[Arrays]:
    """Run the engine in a process of its own, which TensorRT may choose its libraries for, and may crash.

    Raises:
        NotCheckedError: If this machine lacks what the runtime needs.
        BackendError: If the engine does not load or run.
    """
    inputs = save(
        {f"{index}.{name}": array.copy() for index, feed in enumerate(batches) for name, array in feed.items()}
    )
    request = json.dumps(
        {
            "engine": str(engine.path.resolve()),
            "sha256": engine.sha256,
            "backend": backend,
            "feeds": len(batches),
        }
    )
    head, _, body = ask(_WORKER, request.encode() + b"\n" + inputs, "ran").partition(b"\n")
    answer = json.loads(head)
    if "not_checked" in answer:
        raise NotCheckedError(answer["not_checked"])
    if "problem" in answer:
        raise BackendError(answer["problem"], "Build the engine again.")
    return unpack(load(body), len(batches))


def unpack(tensors: Mapping[str, Any], feeds: int) -> list[Arrays]:
    """Return the mapping of each feed from tensors named `INDEX.NAME`."""
    found: list[dict[str, Any]] = [{} for _ in range(feeds)]
    for key, array in tensors.items():
        index, _, name = key.partition(".")
        found[int(index)][name] = array
    return list(found)
