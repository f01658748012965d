"""`digest`: the files are those that the manifest speaks of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slope_compile.artifacts import FILES, Mismatch, RunFolder
from slope_compile.errors import ArtifactError
from slope_compile.qdq.graph import scopes
from slope_compile.qdq.tensors import external_location, load_graph
from slope_compile.verify.verdict import Check, NotCheckedError, listed

# What a stage writes, or a program finds beside a model by itself. Such a file that nobody lists was put there, or its
# entry was taken away; a note or what a file manager leaves is neither.
ARTIFACTS = (".onnx", ".data", ".safetensors", ".engine", ".json", ".cache", ".bin", ".weights", ".slope")


@dataclass(frozen=True)
class Digests:
    """What comparing files with a manifest gave.

    Args:
        files: How many files the manifest lists.
        mismatches: Those that are missing, or have another size or sha256.
        strangers: Files in the stages' folders that the manifest does not list.
        undigested: What an ONNX file keeps its tensors in though the manifest does not list it, in words.
    """

    files: int
    mismatches: Sequence[Mismatch] = ()
    strangers: Sequence[str] = ()
    undigested: Sequence[str] = ()


def digests_of(folder: RunFolder, stages: Sequence[str]) -> Digests:
    """Compare the files of stages with the manifest.

    Args:
        folder: The run, or a bundle's folder.
        stages: Those to look at; one that is not finished is left out.
    """
    found = [stage for stage in stages if stage in folder.records]
    listed_files = {name for stage in found for name in folder.records[stage].outputs}
    strangers = [name for stage in found for name in folder.unlisted(stage)]
    for stage, name in FILES.items():
        if stage in stages and stage not in found and (folder.path / name).exists():
            strangers.append(name)
    undigested = [
        f"{name} keeps tensors in {data}, which the manifest does not list"
        for name in sorted(listed_files)
        if name.endswith(".onnx")
        for data in sorted(external_files(folder.path / name))
        if (Path(name).parent / data).as_posix() not in listed_files
    ]
    mismatches = [mismatch for stage in found for mismatch in folder.mismatches(stage)]
    return Digests(len(listed_files), mismatches, strangers, undigested)


def check_digests(digests: Digests | None) -> Check:
    """Fail if a file is not what the manifest says, or is an artifact of which it says nothing; others are told."""
    if digests is None:
        raise NotCheckedError("there is no manifest to compare with")
    figures = {
        "files": digests.files,
        "mismatches": [mismatch.path for mismatch in digests.mismatches],
        "not_listed": list(digests.strangers),
    }
    put_there = [name for name in digests.strangers if name.endswith(ARTIFACTS)]
    problems = [*map(str, digests.mismatches), *digests.undigested]
    problems += [f"{name} is not in the manifest" for name in put_there]
    if problems:
        return Check("digest", "fail", listed(problems), figures)
    more = f"; not in the manifest, and not examined: {listed(digests.strangers)}" if digests.strangers else ""
    return Check("digest", "pass", f"{digests.files} files have the manifest's size and sha256{more}", figures)


def external_files(onnx: Path) -> set[str]:
    """Return where a file keeps tensors; nothing of one that cannot be read, which fails elsewhere."""
    try:
        found = {external_location(tensor) for scope in scopes(load_graph(onnx)) for _, tensor in scope.constants()}
    except (ArtifactError, OSError):
        return set()
    return {location for location in found if location is not None}
