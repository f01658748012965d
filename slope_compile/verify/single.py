"""Verification of an ONNX file that belongs to no run, with what lies beside it.

m.onnx                   the file
m.golden.safetensors     inputs, and what the trained model gave for them
m.layers.json            bits and pattern that each weight must have
m.verify/                what `verify` writes
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slope_compile.artifacts import FileDigest, RunFolder, read_json, storage_errors
from slope_compile.build.single import COMPANIONS
from slope_compile.errors import ArtifactError, StorageError
from slope_compile.events import Events
from slope_compile.recipe import parse_pattern
from slope_compile.verify.built.check import check_engine_layers
from slope_compile.verify.ci.write import JSON
from slope_compile.verify.ci.write import NAMES as REPORTS
from slope_compile.verify.files import write_verdict
from slope_compile.verify.laws.check import Declared
from slope_compile.verify.model import verify_model
from slope_compile.verify.parity.engine import EngineUnderTest, engine_under_test, read_header
from slope_compile.verify.verdict import Verdict

GOLDEN, LAYERS, OUT = ".golden.safetensors", ".layers.json", ".verify"
WRITTEN = {"layers.json", "chain", "reproducer", *REPORTS}
NEW, OLD = "new", "old"  # inside the folder that a verification works in
REMEDY = "Name an engine that `slope-compile build` wrote from this file."


def default_out(onnx: Path) -> Path:
    """Return where results are written: beside the file."""
    return onnx.with_suffix(OUT)


def verify_file(
    onnx: Path,
    *,
    golden: Path | None = None,
    engine: Path | None = None,
    trust_engine: bool = False,
    out: Path | None = None,
    required: tuple[str, ...] = (),
    events: Events | None = None,
) -> Verdict:
    """Verify an ONNX file, and write what was found into a folder of its own.

    Args:
        onnx: The file.
        golden: Golden inputs and outputs; default: those beside the file, if there are any.
        engine: An engine that was built from it, its .layers.json beside it.
        trust_engine: Load the engine although no manifest has its sha256.
        out: The folder; default: beside the file.
        required: Checks that must pass.
        events: Who is told.

    Raises:
        ArtifactError: If a file that was named is missing, or the engine is not the one that its layer list describes,
            or not trusted.
        StorageError: If the folder holds something else, or cannot be written.
    """
    for path in (onnx, golden, engine):
        if path is not None and not path.is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            raise ArtifactError(f"{path} {what}.", "Check the path.")
    under_test = None if engine is None else _engine(engine, trust_engine)
    placed = None if engine is None else _companion(engine, "placed.onnx")
    with results(out or default_out(onnx)) as partial:
        verdict = verify_model(
            onnx,
            golden=golden or golden_beside(onnx),
            declared=declared_beside(onnx),
            engine=under_test,
            engine_layers=lambda: check_engine_layers(under_test, onnx, placed, None),
            layers=listed_beside(onnx),
            placed=placed,
            out=partial,
            events=events,
        )
        verdict = Verdict(verdict.checks, required)
        write_verdict(partial, verdict)
    return verdict


@contextmanager
def results(folder: Path) -> Iterator[Path]:
    """Give a folder to write results into, which then takes the place of `folder`.

    Raises:
        StorageError: If the folder holds something else, or cannot be written.
    """
    folder = folder.resolve()  # of a link, what it leads to is replaced
    with storage_errors(folder):
        require_ours(folder)
        work = _fresh(folder)
        try:
            yield work / NEW
            _replace(folder, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def golden_beside(file: Path) -> Path | None:
    """Return the golden samples beside a file, if there are any."""
    return _beside(file, GOLDEN)


def _beside(file: Path, suffix: str) -> Path | None:
    path = file.with_suffix(suffix)
    return path if path.is_file() else None


def _companion(engine: Path, name: str) -> Path | None:
    """Return what `build` wrote beside an engine: in a run under its own name, elsewhere under the engine's."""
    paths = (engine.with_name(engine.name + COMPANIONS[name]), engine.with_name(name))
    return next((path for path in paths if path.is_file()), None)


def _engine(engine: Path, trust: bool) -> EngineUnderTest:
    """Return the engine to test, if its layer list describes it and it may be loaded.

    Raises:
        ArtifactError: If not.
    """
    layers = _companion(engine, "layers.json")
    if layers is None:
        raise ArtifactError(f"There is no {engine.name}{LAYERS} beside {engine}.", REMEDY)
    under_test, sha256 = engine_under_test(engine, layers, _listed(engine), trust), FileDigest.of(engine).sha256
    if not under_test.trusted:
        raise ArtifactError(
            f"{engine} is not loaded: its sha256, {sha256}, is in no run's manifest, and an engine is code.",
            "If you built it yourself, say --trust-engine.",
        )
    if read_header(layers).get("engine_sha256") != sha256:
        raise ArtifactError(f"{engine} is not the engine that {layers.name} describes.", REMEDY)
    return under_test


def _listed(engine: Path) -> FileDigest | None:
    """Return what the manifest says of an engine that lies in a run, or in a bundle's folder."""
    path = engine.resolve()
    run = path.parent.parent.parent
    if not (run / "manifest.json").is_file():
        return None
    stage = path.parent.relative_to(run).as_posix()
    record = RunFolder.existing(run).records.get(stage)
    return None if record is None else record.outputs.get(f"{stage}/{path.name}")


def listed_beside(file: Path) -> Path | None:
    """Return the export's layer list beside a file; None where there is none."""
    return _beside(file, LAYERS)


def declared_beside(file: Path) -> Callable[[], dict[str, Declared]] | None:
    """Return what reads the layer list beside a file; None where there is none."""
    path = listed_beside(file)
    return None if path is None else lambda: _read_declared(path)


def _read_declared(path: Path) -> dict[str, Declared]:
    try:
        rows: list[Any] = [row for row in read_json(path)["layers"] if row["bits"] is not None]
        return {
            str(row["name"]): Declared(
                int(row["bits"]), None if row["pattern"] is None else parse_pattern(row["pattern"])
            )
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path.name} is no layer list of an export: {error}.", "Export the model again.") from None


def require_ours(folder: Path) -> None:
    """Raise unless a folder may be replaced: there is none, it is empty, or it is a verification's and nothing else.

    Raises:
        StorageError: If it holds anything else, or no verdict of ours.
    """
    if not folder.exists():
        return
    with storage_errors(folder):
        names = sorted(path.name for path in folder.iterdir())
    other = [name for name in names if name not in WRITTEN]
    if other or (names and not _is_verdict(folder / JSON)):
        why = other[0] if other else f"{names[0]} and no {JSON} of ours"
        raise StorageError(f"{folder} holds {why}: it is no folder of a verification.", "Name another one with --out.")


def _is_verdict(path: Path) -> bool:
    try:
        found = read_json(path)
        known = all({"name", "status", "detail", "figures"} == set(check) for check in found["checks"])
        return known and found["verdict"] in ("pass", "fail") and isinstance(found["required"], list)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remove_results(folder: Path) -> None:
    """Take away what an earlier verification wrote.

    Raises:
        StorageError: If the folder holds anything else, or cannot be emptied.
    """
    folder = folder.resolve()
    require_ours(folder)
    if folder.exists():
        with storage_errors(folder):
            work = _fresh(folder)
            try:
                folder.rename(work / OLD)
            finally:
                shutil.rmtree(work, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    """Return a new folder to work in beside the one to write: what is there under any name may be somebody's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    (work / NEW).mkdir()  # with the rights that the user's new folders have
    return work


def _replace(folder: Path, work: Path) -> None:
    require_ours(folder)  # a verification takes minutes
    if folder.exists():
        folder.rename(work / OLD)
    try:
        (work / NEW).rename(folder)
    except OSError:
        if (work / OLD).exists():
            (work / OLD).rename(folder)
        raise
