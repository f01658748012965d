"""`slope-compile unpack`: what a packed file holds, as files that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slope_compile.artifacts import PACKED_SUFFIX, FileDigest
from slope_compile.errors import ArtifactError
from slope_compile_cli import options, pack
from slope_compile_cli.console import Console

SUFFIX = ".unpacked"

File = Annotated[Path, typer.Argument(help="A packed file: NAME.slope.")]
Folder = Annotated[
    Path | None, typer.Option("--out", help="Where to write; files there are kept. Default: NAME.unpacked beside it.")
]


def command(file: File, out: Folder = None, json: options.Json = False) -> None:
    """Write codes.safetensors and tensors.safetensors of a packed model, or the .onnx file bit for bit."""
    from slope_compile.pack.read import open_packed

    console = Console(json)
    if file.is_dir():
        remedy = f"Name its packed file: {file / pack.PACKED}." if (file / pack.PACKED).is_file() else "Name a file."
        raise ArtifactError(f"{file} is a folder, not a packed file.", remedy)
    if file.is_file() and not pack.is_packed(file):
        raise ArtifactError(
            f"{file} is no packed file.", f"Name a file that `slope-compile pack` wrote: NAME{PACKED_SUFFIX}."
        )
    packed = open_packed(file)
    folder = out or file.with_suffix(SUFFIX)
    written = packed.restore(folder)
    for path in written:
        console.say(f"{path}: {path.stat().st_size} bytes")
    files = [
        {"path": str(path), "bytes": d.size, "sha256": d.sha256} for path in written for d in [FileDigest.of(path)]
    ]
    console.result({"packed": str(file), "content": packed.kind, "folder": str(folder), "files": files})
