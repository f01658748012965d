"""The counts over an engine's rows, and the one line that says them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slope_compile.build.inspector import NOWHERE, read_layers
from slope_compile.build.layers import parse_sparsity
from slope_compile.build.sparse import OWN_COUNT, sparse_counts
from slope_compile.placement.rules import INT8
from slope_compile.targets.backends import Backend

FLOAT_TYPES = ("Float", "Half", "BFloat16")
MOST_NAMED = 8  # layers in a sentence
NO_LIST = "neither the engine inspector nor the build log has a layer list"


def summarize(rows: Sequence[Mapping[str, Any]], log: str, backend: Backend, inspector: str = "") -> dict[str, Any]:
    """Return the counts over an engine; None where nobody says.

    Args:
        rows: As `engine_rows` returned them.
        log: The build log.
        backend: Who built.
        inspector: The engine inspector's JSON, if any.
    """
    layers, read_from = read_layers(log, inspector)
    coded = [row for row in rows if row["placement"] != "float"]
    not_found = [row["name"] for row in coded if row["engine"]["dtype"] is None]
    fused = [row for row in rows if row["engine"]["dtype"] == "Int4" and row["engine"]["fused"]]
    summary: dict[str, Any] = {
        "layers": len(rows),
        "read_from": read_from,
        "coded": len(coded),
        "held": sum(row["engine"]["held"] for row in coded) if layers else None,
        "not_held": [row["name"] for row in coded if not row["engine"]["held"]] if layers else None,
        "not_found": not_found,
        "types": dict(sorted(Counter(row["engine"]["dtype"] or "not found" for row in rows).items())),
        "weight_bytes": sum(row["engine"]["bytes"] or 0 for row in rows),
        "int8": {
            "declared": sum(row["placement"] in INT8 for row in rows),
            "multiplied": _all_known([row["engine"]["int8_product"] for row in rows]) if layers else None,
        },
        "int4": {
            "held": sum(row["engine"]["dtype"] == "Int4" for row in rows) if layers else None,
            "fused": len(fused) if layers else None,
        },
        "float": sum(is_float(row) for row in rows) if layers and not not_found else None,
        "sparse": sparse_counts(rows, layers, parse_sparsity(log), backend),
    }
    return {**summary, "line": summary_line(summary)}


def is_float(row: Mapping[str, Any]) -> bool:
    """Return whether a layer multiplies with a float weight: placed so, or held so against what was declared."""
    if row["placement"] == "sparse-fp16":
        return False  # FP16 is what sparse FP16 kernels read
    return row["placement"] == "float" or row["engine"]["dtype"] in FLOAT_TYPES


def summary_line(summary: Mapping[str, Any]) -> str:
    """Return `n of m layers eligible for sparse kernels, k chosen; INT4 fused in j; float left in i`.

    A number that cannot be known stands as `not checked: REASON`; where TensorRT does not say what is eligible, our own
    count stands in its place and is called that.

    Args:
        summary: As `summarize` returned it, or layers.json's `summary`.
    """
    sparse = summary["sparse"]
    eligible = f"{sparse['eligible']} of {summary['layers']} layers eligible for sparse kernels"
    if sparse["eligible"] is None:
        reason = sparse["eligible_by"].removeprefix("not checked: ")
        eligible = (
            f"{sparse['possible']} of {summary['layers']} layers eligible for sparse kernels ({OWN_COUNT}; {reason})"
        )
    chosen = f"{sparse['chosen']} chosen" if sparse["chosen"] is not None else f"chosen {sparse['chosen_by']}"
    int4 = summary["int4"]["fused"]
    fused = f"INT4 fused in {int4}" if int4 is not None else f"INT4 fused not checked: {NO_LIST}"
    left = summary["float"] if summary["float"] is not None else f"not checked: {why_no_float(summary)}"
    return f"{eligible}, {chosen}; {fused}; float left in {left}"


def why_no_float(summary: Mapping[str, Any]) -> str:
    """Return why nobody knows how many layers are left in float, where that is so.

    Args:
        summary: As `summarize` returned it, or layers.json's `summary`.
    """
    if summary["read_from"] == NOWHERE:
        return NO_LIST
    return f"the engine's layer list shows no constant for {named(summary['not_found'])}"


def named(names: Sequence[str]) -> str:
    """Return the names of layers for a sentence: the first of many, for layers.json has them all."""
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"


def _all_known(products: Sequence[bool | None]) -> int | None:
    return None if any(product is None for product in products) else sum(map(bool, products))
