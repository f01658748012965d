"""`engine.layers`: what the engine holds is what the bundle placed, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from slope_compile.artifacts import read_json
from slope_compile.errors import ArtifactError
from slope_compile.placement.choose import Place
from slope_compile.verify.verdict import Check, NotCheckedError, listed

NAME = "engine.layers"


class _Row(NamedTuple):
    """What layers.json says of a layer: where it was placed, and what the engine holds."""

    placement: str
    held: bool
    dtype: str | None
    note: str | None


def check_layers(expected: Mapping[str, Place], layers: Path) -> Check:
    """Fail if a compressed layer lost its placement: the engine multiplies with another type than the one placed.

    A layer of which the engine's layer list shows no constant is not told; it is no failure, and no pass alone.

    Args:
        expected: Weight name -> where the bundle placed it.
        layers: The build's layers.json.
    """
    if not layers.is_file():
        raise NotCheckedError("no engine was built here")
    rows = _rows(layers)
    wanted = {name: place for name, place in expected.items() if place.placement != "float"}
    lost: dict[str, str] = {}
    untold: dict[str, str] = {}
    for name, place in wanted.items():
        row = rows.get(name)
        if row is None or row.placement != place.placement:
            lost[name] = f"{name}: placed as {place.placement}, built as {row and row.placement}"
        elif not row.held:
            (lost if row.dtype else untold)[name] = f"{name}: placed as {place.placement}; {row.note}"
    figures = {
        "layers": len(wanted),
        "held": len(wanted) - len(lost) - len(untold),
        "lost": list(lost),
        "not_told": list(untold),
    }
    if lost:
        return Check(NAME, "fail", listed(lost.values()), figures)
    if untold and not figures["held"]:
        raise NotCheckedError(listed(untold.values()))
    told = f"{figures['held']} of {len(wanted)} compressed layers are held as they were placed"
    return Check(
        NAME, "pass", told + (f"; of the others nothing is told: {listed(untold.values())}" if untold else ""), figures
    )


def _rows(path: Path) -> dict[str, _Row]:
    """Return the build's rows by weight name.

    Raises:
        ArtifactError: If it is no layers.json of a build.
    """
    try:
        return {
            row["name"]: _Row(row["placement"], row["engine"]["held"], row["engine"]["dtype"], row["engine"]["note"])
            for row in read_json(path)["layers"]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path.name} is not a build's layer list: {error}.", "Build the engine again.") from None
