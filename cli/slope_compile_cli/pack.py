"""`slope-compile pack`: a trained run, or an ONNX file, as small as it is stored and sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slope_compile.artifacts import FILES, PACKED_SUFFIX, FileDigest
from slope_compile.errors import ArtifactError, RecipeError
from slope_compile_cli import bundle, options
from slope_compile_cli.console import Console

if TYPE_CHECKING:
    from slope_compile.pack.read import Packed
    from slope_compile.pack.sizes import TensorSize

PACKED = FILES["pack"]
COLUMNS = ("tensor", "type", "shape", "bits", "pattern", "nominal bytes", "packed bytes", "packed bits each")
MOST_ROWS = 500  # of a table; people read no more, and laying out a hundred thousand takes minutes
Source = Annotated[Path, typer.Argument(help="A run folder, or an .onnx file.")]
PackedOut = Annotated[
    Path | None, typer.Option("--out", help="For an .onnx file: the packed file. Default: NAME.slope beside it.")
]


def command(
    source: Source,
    out: PackedOut = None,
    json: options.Json = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
) -> None:
    """Pack what was trained into RUN/model.slope, or an .onnx file so that it comes back bit for bit."""
    console = Console(json)
    if bundle.is_bundle(source):
        raise ArtifactError(f"{source} is a bundle, which is packed as it is.", "Name a run folder or an .onnx file.")
    if source.suffix == ".onnx" and not source.is_dir():
        if dry_run or force:
            raise RecipeError(
                f"{source} is an .onnx file: --dry-run and --force go with a run folder.", "Leave them out."
            )
        _pack_file(console, source, out)
        return
    if source.is_file():
        what = "is packed already" if source.suffix == PACKED_SUFFIX else "is neither a run folder nor an .onnx file"
        raise ArtifactError(f"{source} {what}.", "Name a run folder or an .onnx file.")
    if out is not None:
        raise RecipeError(f"--out {out} goes with an .onnx file: a run keeps its {PACKED}.", "Leave it out.")
    recipe = options.recipe_of(source, [])
    outcomes = options.execute(recipe, source, lambda _: ["pack"], console, force=force, dry_run=dry_run)
    told = {"run": str(source), "outcomes": options.outcomes_json(outcomes)}
    if not dry_run:
        from slope_compile.pack.read import open_packed

        told |= _tell(console, open_packed(source / PACKED))
    console.result(told)


def _pack_file(console: Console, onnx: Path, out: Path | None) -> None:
    from slope_compile.pack.write import pack_onnx

    if out is not None and out.suffix != PACKED_SUFFIX:
        raise RecipeError(
            f"--out {out} does not end in {PACKED_SUFFIX}.", f"Example: --out {out.with_suffix(PACKED_SUFFIX)}"
        )
    packed = pack_onnx(onnx, out or onnx.with_suffix(PACKED_SUFFIX))
    console.result({"onnx": str(onnx), **_tell(console, packed)})


def _tell(console: Console, packed: Packed) -> dict[str, Any]:
    """Print where a packed file is and what it takes, and return that as JSON."""
    told = described(packed)
    console.say(f"packed file: {packed.path}, {told['bytes']} bytes; {told['line']}")
    return told


def described(packed: Packed) -> dict[str, Any]:
    """Return a packed file in JSON's form: its digest, its sizes, and the line that sums them up."""
    sizes, digest = packed.sizes, FileDigest.of(packed.path)
    return {
        "packed": str(packed.path),
        "content": packed.kind,
        "bytes": digest.size,
        "sha256": digest.sha256,
        "sizes": {"weights": sizes.weights, "others": sizes.others, "rest": sizes.rest, "model": sizes.model},
        "line": _line(packed),
    }


def is_packed(path: Path) -> bool:
    """Whether an argument names a packed file, by its suffix, or by how it begins where it has another one."""
    from slope_compile.pack.container import begins_packed

    return not path.is_dir() and (path.suffix == PACKED_SUFFIX or begins_packed(path))


def inspect(console: Console, path: Path) -> None:
    """Print what each tensor of a packed file takes; its header is proved, its tensors are not read."""
    from slope_compile.pack.read import open_packed

    packed = open_packed(path)
    told = described(packed)
    tensors = packed.sizes.tensors
    rows = [
        (row.name, row.dtype, "x".join(map(str, row.shape)), row.bits, row.pattern, row.nominal, row.packed,
         f"{8 * row.packed / row.elements:.3f}" if row.elements else None)
        for row in tensors[:MOST_ROWS]
    ]  # fmt: skip
    if not console.json:
        console.table(str(path), COLUMNS, rows)
        if len(tensors) > MOST_ROWS:
            console.say(f"and {len(tensors) - MOST_ROWS} more tensors: --json lists all of them")
    sizes = told["sizes"]
    console.say(
        f"{told['bytes']} bytes: {sizes['weights']} of weights, {sizes['others']} of other tensors, "
        f"{sizes['rest']} of the header{' and the graph' if packed.kind == 'onnx' else ''}"
    )
    console.say(told["line"])
    console.result({**told, "tensors": [_row(row) for row in tensors]})


def _row(row: TensorSize) -> dict[str, Any]:
    return {
        "name": row.name, "dtype": row.dtype, "shape": list(row.shape), "bits": row.bits, "pattern": row.pattern,
        "nonzeros": row.nonzeros, "nominal": row.nominal, "packed": row.packed,
    }  # fmt: skip


def _line(packed: Packed) -> str:
    """`11167232 codes of 19 tensors at 2.126 bits each, scales included, and 102 other tensors`."""
    from slope_compile.pack.sizes import CODED

    rows = packed.sizes.tensors
    if packed.kind == "onnx":
        return f"{' and '.join(packed.files)} with {len(rows)} tensors, to be restored bit for bit"
    codes = sum(row.elements for row in rows if row.dtype == CODED)
    bits = f" at {8 * packed.sizes.weights / codes:.3f} bits each, scales included" if codes else ""
    coded = f"{codes} codes of {len(packed.codes)} tensors{bits}"
    return f"{coded}, and {len(packed.tensors)} other tensors"
