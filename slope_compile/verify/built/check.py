"""`engine.layers`: what is written of an engine is so, and the engine holds what was placed, layer by layer.

layers.json of a build speaks of four files: the exported ONNX file, the placed one, the engine and the build log. All
that it says of them is counted again and compared. What only the GPU's engine inspector told is not: it is not kept.
The engine's bytes are searched for the placed codes and scales: another model's engine is found out without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slope_compile.artifacts import read_json
from slope_compile.build.counts import summarize, summary_line
from slope_compile.build.inspector import NOWHERE
from slope_compile.errors import ArtifactError
from slope_compile.placement.choose import Place
from slope_compile.targets.backends import BACKENDS, Backend
from slope_compile.verify.built.constants import Constants, find_constants
from slope_compile.verify.built.header import header_problems
from slope_compile.verify.built.rows import (
    count_weights,
    engine_problems,
    placement_problems,
    stored_rows,
)
from slope_compile.verify.parity.engine import EngineUnderTest
from slope_compile.verify.verdict import Check, NotCheckedError, Status, listed

NAME = "engine.layers"
MAX_LOG_BYTES = 2**30
INSPECTED, LOG = "engine inspector", "build log"  # where the engine's layers were read
_ONE_LAYER = '{"Layers": [{"Name": "?"}]}'  # an inspector's list: there is one, which is all that counts need
_FROM_INSPECTOR = ("eligible", "eligible_by", "chosen", "chosen_by")


@dataclass(frozen=True)
class Layers:
    """layers.json of a build, and what lies beside it.

    Args:
        header: For what and by whom the engine was built.
        summary: Counts over the rows.
        rows: One a weight.
        log: The build log; None where it is not there: no manifest lists it.
        export: The export's layer list; None: the rows were made without one.
    """

    header: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    log: str | None
    export: Mapping[str, Any] | None

    @property
    def by_name(self) -> dict[str, Mapping[str, Any]]:
        """The rows by weight."""
        return {row["name"]: row for row in self.rows}


def check_engine_layers(
    engine: EngineUnderTest | None,
    onnx: Path,
    placed: Path | None,
    target: str | None,
    expected: Mapping[str, Place] | None = None,
) -> Check:
    """Fail if layers.json says what is not so, or if a compressed layer lost its placement in the engine.

    Args:
        engine: The engine and its layers.json, if anything was built. The engine is not loaded.
        onnx: The exported file; the export's layer list beside it.
        placed: The file that the backend got.
        target: For which target the engine is to be; None: for whichever it says.
        expected: Weight -> where it was to be placed; None: nobody but layers.json says.
    """
    if engine is None:
        raise NotCheckedError("no engine was built here")
    if not engine.path.is_file():
        return Check(NAME, "fail", f"{engine.path.name} is missing")
    if placed is not None and not placed.is_file():
        return Check(NAME, "fail", f"{placed.name} is missing")
    layers = _read(engine, onnx)
    try:
        problems, unseen = _problems(layers, engine.path, onnx, placed, target)
        constants = _constants(layers, engine.path, placed)
        status, told, figures = held_layers(layers.by_name, expected)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise _not_ours(engine.layers, error) from None
    problems += constants.absent
    unseen += filter(None, [constants.unseen])
    figures |= {"rows": len(layers.rows), "problems": len(problems), "not_examined": unseen}
    figures["constants"] = {"looked_for": constants.looked_for, "found": constants.found}
    if problems:
        lost = [told] if status == "fail" else []
        return Check(NAME, "fail", listed([*lost, *problems]), figures)
    told += f"; {engine.layers.name} agrees with the files" + (f"; not examined: {listed(unseen)}" if unseen else "")
    return Check(NAME, status, told, figures)


def held_layers(
    rows: Mapping[str, Mapping[str, Any]], expected: Mapping[str, Place] | None = None
) -> tuple[Status, str, dict[str, Any]]:
    """Say which compressed layers the engine holds as they were placed.

    A layer of which the engine's layer list shows no constant is not told; it is no failure, and no pass alone.

    Args:
        rows: Of layers.json, by weight.
        expected: As `check_engine_layers`.

    Returns:
        The status, a line, and figures: `layers` (compressed), `held`, `lost`, `not_told`.
    """
    places = {name: row["placement"] for name, row in rows.items()}
    if expected is not None:
        places = {name: place.placement for name, place in expected.items()}
    wanted = {name: placement for name, placement in places.items() if placement != "float"}
    lost: dict[str, str] = {}
    untold: dict[str, str] = {}
    for name, placement in wanted.items():
        row = rows.get(name)
        if row is None or row["placement"] != placement:
            lost[name] = f"{name}: placed as {placement}, built as {row and row['placement']}"
        elif not row["engine"]["held"]:
            which = lost if row["engine"]["dtype"] else untold
            which[name] = f"{name}: placed as {placement}; {row['engine']['note']}"
    held = len(wanted) - len(lost) - len(untold)
    figures = {"layers": len(wanted), "held": held, "lost": list(lost), "not_told": list(untold)}
    if lost:
        return "fail", listed(lost.values()), figures
    if untold and not held:
        return "not checked", listed(untold.values()), figures
    told = f"{held} of {len(wanted)} compressed layers are held as they were placed"
    return "pass", told + (f"; of the others nothing is told: {listed(untold.values())}" if untold else ""), figures


def _problems(
    layers: Layers, engine: Path, onnx: Path, placed: Path | None, target: str | None
) -> tuple[list[str], list[str]]:
    """Return what is not so, and what could not be examined, in words."""
    rows, summary = layers.by_name, layers.summary
    problems = [] if len(rows) == len(layers.rows) else ["a name has several rows"]
    placements = [row["placement"] for row in layers.rows]
    problems += header_problems(layers.header, engine, onnx, placed, target, placements)
    stored = count_weights(onnx, rows)
    if absent := sorted({one.like.name for one in stored} - rows.keys()):
        return [*problems, f"no row for {listed(absent)}"], []
    problems += stored_rows(stored, rows)
    backend = BACKENDS.get(layers.header.get("backend", ""))
    if backend is None:
        return problems, []
    source = summary["read_from"]
    from_log = source == NOWHERE or (source == LOG and layers.log is not None)
    unseen = [] if from_log else [f"what only the {source} told: it is not there"]
    if placed is None:
        unseen.append("placements and constants: the placed file is not there")
    else:
        problems += placement_problems(stored, rows, placed, layers.header["precision"])
        problems += engine_problems(stored, layers.rows, placed, layers.log or "", backend, layers.export, from_log)
    problems += _summary_problems(layers, backend, from_log)
    return problems, unseen


def _constants(layers: Layers, engine: Path, placed: Path | None) -> Constants:
    """Return what was found of the placed weights in the engine's bytes."""
    if placed is None:
        return Constants()  # told already: nothing of the placed file was examined
    return find_constants(engine, placed, layers.by_name, layers.header)


def _summary_problems(layers: Layers, backend: Backend, from_log: bool) -> list[str]:
    """Return where the summary is not the rows counted."""
    found = layers.summary
    if found["read_from"] not in (INSPECTED, NOWHERE, LOG):
        return [f"the summary was read from {found['read_from']!r}"]
    made = summarize(layers.rows, layers.log or "", backend, "" if from_log else _ONE_LAYER)
    if not from_log:  # what the inspector's own list says beyond the rows
        sparse = {**made["sparse"], **{key: found["sparse"][key] for key in _FROM_INSPECTOR}}
        made = {**made, "sparse": sparse, "read_from": found["read_from"]}
        made["line"] = summary_line(made)
    keys = sorted(key for key in {*found, *made} if found.get(key) != made.get(key))
    return [f"summary: {key} is {found.get(key)!r}, counted again {made.get(key)!r}" for key in keys]


def _read(engine: EngineUnderTest, onnx: Path) -> Layers:
    """Read layers.json with what lies beside it.

    Raises:
        ArtifactError: If a file is missing, or not a build's.
    """
    path = engine.layers
    own = path.name == "layers.json"  # in a run or on a device; beside a lone engine it has the engine's name
    log = path.with_name("build.log" if own else f"{engine.path.name}.log")
    try:
        document = read_json(path)
        text = _text(log) if log.is_file() else None
        export = read_json(onnx.with_name("layers.json")) if own and onnx.with_name("layers.json").is_file() else None
        return Layers(dict(document["header"]), dict(document["summary"]), list(document["layers"]), text, export)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_ours(path, error) from None


def _text(log: Path) -> str:
    if (size := log.stat().st_size) > MAX_LOG_BYTES:
        raise ValueError(f"{log.name} has {size} bytes, more than {MAX_LOG_BYTES}")
    return log.read_text(encoding="utf-8", errors="replace")


def _not_ours(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is not a build's layer list: {type(error).__name__}: {error}.", "Build the engine again."
    )
