"""`slope-compile inspect`: what an artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slope_compile.artifacts import RunFolder
from slope_compile.errors import ArtifactError
from slope_compile.summary import summarize
from slope_compile_cli import options
from slope_compile_cli.console import Console
from slope_compile_cli.run import print_summary

LAYER_COLUMNS = ("name", "bits", "activation_bits", "pattern", "density", "cosine", "sqnr_db", "placement", "reason")


def command(
    artifact: Annotated[Path, typer.Argument(help="A run folder, an .onnx file or a codes.safetensors file.")],
    json: options.Json = False,
) -> None:
    """Print stages, layers and sizes of a run, or the coded weights of a file."""
    console = Console(json)
    if artifact.is_dir():
        _run(console, artifact)
    elif artifact.suffix == ".onnx":
        _weights(console, artifact, _onnx_rows(artifact))
    elif artifact.suffix == ".safetensors":
        _weights(console, artifact, _codes_rows(artifact))
    else:
        what = "is neither a run folder, an .onnx nor a .safetensors file" if artifact.exists() else "does not exist"
        raise ArtifactError(f"{artifact} {what}.", "Name one of these.")


def _run(console: Console, path: Path) -> None:
    folder = RunFolder.existing(path)
    summary = summarize(folder)
    stages = [
        (stage, len(r.outputs), r.facts.get("wall_s"), "; ".join(map(str, folder.mismatches(stage))) or "ok")
        for stage, r in folder.records.items()
    ]
    console.table("stages", ["stage", "files", "seconds", "state"], stages)
    rows = summary["layers"]
    # Only what was asked for has a column.
    columns = [c for c in LAYER_COLUMNS if c != "activation_bits" or any(row.get(c) is not None for row in rows)]
    console.table("layers", columns, [[_short(row.get(c)) for c in columns] for row in rows])
    print_summary(console, summary)
    console.result(summary)


def _onnx_rows(path: Path) -> list[dict[str, Any]]:
    import numpy as np

    from slope_compile.qdq.pattern import is_sparse
    from slope_compile.qdq.reader import coded_weights

    return [
        {
            "name": weight.name,
            "op": weight.op,
            "dtype": weight.dtype,
            "shape": list(weight.stored.shape),
            "density": int(np.count_nonzero(weight.stored)) / max(1, weight.stored.size),
            "fits_2_4": is_sparse(weight),
        }
        for weight in coded_weights(path)
    ]


def _codes_rows(path: Path) -> list[dict[str, Any]]:
    from slope_compile.codes_file import load_codes

    return [
        {"name": name, "bits": c.bits, "pattern": c.pattern, "shape": list(c.codes.shape), "density": c.density}
        for name, c in load_codes(path).items()
    ]


def _weights(console: Console, path: Path, rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0]) if rows else ["name"]
    console.table(str(path), columns, [[_short(value) for value in row.values()] for row in rows])
    console.result({"file": str(path), "bytes": path.stat().st_size, "weights": rows})


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
