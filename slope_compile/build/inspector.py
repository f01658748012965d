"""The layer list as the engine inspector tells it: JSON of an engine built with ProfilingVerbosity.DETAILED.

`{"Layers": [{"Name", "LayerType", "Inputs": [{"Name", "Dimensions", "Format/Datatype"}], "Outputs", "Weights":
{"Type", "Count"}, "HasSparseWeights", "TacticName", "Metadata"}], "Bindings"}` from TensorRT 8.6 on; TensorRT-RTX
writes `Constants` and `Datatype`. Any key may be missing. At a lower verbosity a layer is its name alone: nothing to
read. An inspector needs an engine that loads, and so a GPU; elsewhere `layers.py` reads the same from the build log.
"""

from __future__ import annotations

import json
from typing import Any

from slope_compile.build.layers import COUNTED, Constant, EngineLayer, engine_layer, parse_layers, type_name

MOST_BYTES = 100_000_000
NOWHERE = "nowhere"
SECTIONS = ("Inputs", "Constants", "Outputs")


def read_layers(log: str, inspector: str) -> tuple[tuple[EngineLayer, ...], str]:
    """Return the engine's layers and where they were read: `engine inspector`, `build log` or `nowhere`.

    Args:
        log: The build log.
        inspector: The engine inspector's JSON, empty where no GPU was there to load the engine.
    """
    if found := parse_inspector(inspector):
        return found, "engine inspector"
    found = parse_layers(log)
    return found, "build log" if found else NOWHERE


def parse_inspector(text: str) -> tuple[EngineLayer, ...]:
    """Return the layers in the inspector's order; empty where the text has no details of any layer.

    Args:
        text: What `get_engine_information(LayerInformationFormat.JSON)` returned, or nothing.
    """
    if len(text) > MOST_BYTES:
        return ()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    listed = document.get("Layers") if isinstance(document, dict) else document
    rows = listed if isinstance(listed, list) else []
    return tuple(_layer(row) for row in rows if isinstance(row, dict) and isinstance(row.get("Name"), str))


def _layer(row: dict[str, Any]) -> EngineLayer:
    sparse = row.get("HasSparseWeights")
    tactic, metadata = row.get("TacticName"), row.get("Metadata")
    return engine_layer(
        name=row["Name"],
        kind=str(row.get("LayerType", "")),
        tensors={key: _tensors(row.get(key)) for key in SECTIONS},
        weights=_weights(row.get("Weights")),
        tactic=tactic.strip() if isinstance(tactic, str) else None,
        metadata=metadata if isinstance(metadata, str) else None,
        sparse_weights=bool(sparse) if isinstance(sparse, int) else None,
    )


def _weights(found: Any) -> Constant | None:
    if not isinstance(found, dict) or not _is_count(found.get("Count")) or not found["Count"]:
        return None
    return Constant(COUNTED, (found["Count"],), type_name(str(found.get("Type", ""))))


def _tensors(listed: Any) -> tuple[Constant, ...]:
    rows = [row for row in listed if isinstance(row, dict)] if isinstance(listed, list) else []
    return tuple(
        Constant(row["Name"], _shape(row.get("Dimensions")), type_name(_type(row)))
        for row in rows
        if isinstance(row.get("Name"), str)
    )


def _shape(dimensions: Any) -> tuple[int, ...]:
    """Return the shape; one unknown dimension where there is none to read."""
    if not isinstance(dimensions, list) or not all(_is_count(extent) or extent == -1 for extent in dimensions):
        return (-1,)
    return tuple(dimensions)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _type(row: dict[str, Any]) -> str:
    return str(row.get("Format/Datatype") or row.get("Datatype") or "")
