"""Where a bundle lives on a device: a folder beside it, its stages those of a run.

NAME/bundle/          the archive's files
NAME/build/TARGET/    what `build` made of them
NAME/verify/TARGET/   what `verify` found
NAME/manifest.json    what of it is finished
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slope_compile import machine
from slope_compile.artifacts import RunFolder, storage_errors
from slope_compile.bundle.archive import opened_bundle, unpack
from slope_compile.bundle.contents import INDEX, Contents, read_contents
from slope_compile.errors import ArtifactError

STAGE = "bundle"
SUFFIXES = (".bundle.zip", ".zip")


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that was unpacked.

    Args:
        folder: Its folder, whose lock is held.
        contents: What its bundle.json says.
    """

    folder: RunFolder
    contents: Contents

    @property
    def files(self) -> Path:
        """The folder of the archive's files."""
        return self.folder.stage_path(STAGE)

    @property
    def identity(self) -> str:
        """The sha256 of bundle.json, which lists every file's."""
        return identity_of(self.contents)

    def require_whole(self) -> None:
        """Raise unless the unpacked files are those that the archive had.

        Raises:
            ArtifactError: If one is missing, truncated or edited.
        """
        if mismatches := self.folder.mismatches(STAGE):
            told = "; ".join(str(mismatch) for mismatch in mismatches[:3])
            raise ArtifactError(
                f"{self.folder.path}: {told}. It was truncated or edited after the bundle was unpacked.",
                "Delete that folder; the archive is then unpacked again.",
            )


def is_bundle(source: Path) -> bool:
    """Whether a path names a bundle: an archive, or the folder of one that was unpacked."""
    return source.suffix == ".zip" or (source / STAGE / INDEX).is_file()


def default_folder(archive: Path) -> Path:
    """Return where an archive is unpacked: beside it, named as it is without `.bundle.zip`."""
    names = [archive.name.removesuffix(suffix) for suffix in SUFFIXES if archive.name.endswith(suffix)]
    return archive.with_name(next(name for name in (*names, f"{archive.name}.bundle") if name))


def identity_of(contents: Contents) -> str:
    """Return the sha256 of a bundle's bundle.json."""
    return hashlib.sha256(contents.to_json().encode()).hexdigest()


@contextmanager
def open_bundle(
    source: Path, out: Path | None = None, require: Callable[[Contents], object] | None = None
) -> Iterator[OpenBundle]:
    """Hold the folder of a bundle, unpacked first where it is not.

    Args:
        source: The archive, or the folder of one that was unpacked.
        out: The folder; default: beside the archive. None where `source` is the folder.
        require: Raises if what bundle.json says is of no use here; called before anything is unpacked.

    Raises:
        ArtifactError: If the archive is not in order, or the folder holds something else.
        StorageError: If the file system refuses, or another process works there.
    """
    if source.is_dir():
        folder = RunFolder.existing(source)
        with folder.locked():
            contents = contents_in(folder)
            if require is not None:
                require(contents)
            yield OpenBundle(folder, contents)
        return
    with opened_bundle(source) as archive:
        contents = archive.contents
    if require is not None:
        require(contents)
    folder = RunFolder(out or default_folder(source))
    _require_same(folder, contents, source)
    if STAGE not in folder.records:
        _unpack_into(folder, contents, source)
    with folder.locked():
        _require_same(folder, contents, source)  # as it is now that nobody else writes
        yield OpenBundle(folder, contents)


def _unpack_into(folder: RunFolder, contents: Contents, source: Path) -> None:
    """Unpack beside the folder, and move the files in when all are proved: a bad archive leaves nothing behind."""
    beside = folder.path.absolute().parent
    while not beside.exists():
        beside = beside.parent
    with storage_errors(beside), tempfile.TemporaryDirectory(prefix=f".{folder.path.name}.", dir=beside) as work:
        files = Path(work) / STAGE
        files.mkdir()
        if unpack(source, files) != contents:
            raise ArtifactError(f"{source} changed while it was unpacked.", "Run the same command again.")
        with folder.locked():
            if STAGE not in folder.records:  # nobody else did it meanwhile
                shutil.rmtree(folder.partial_path(STAGE), ignore_errors=True)
                files.rename(folder.partial_path(STAGE))
                folder.commit(STAGE, {"bundle": identity_of(contents)}, {"versions": machine.versions()})


def _require_same(folder: RunFolder, contents: Contents, source: Path) -> None:
    """Raise if the folder holds another bundle, or a run."""
    record = folder.records.get(STAGE)
    if record is None and folder.records:
        raise ArtifactError(f"{folder.path} is a run folder, not one of a bundle.", "Name another folder with --out.")
    if record is not None and record.key.get("bundle") != identity_of(contents):
        raise ArtifactError(
            f"{folder.path} holds another bundle than {source.name}.",
            "Name another folder with --out, or delete that one.",
        )


def contents_in(folder: RunFolder) -> Contents:
    """Return what the bundle.json of a folder says in which a bundle was unpacked.

    Raises:
        ArtifactError: If there is none, or not the one that was unpacked.
    """
    path = folder.stage_path(STAGE) / INDEX
    if STAGE not in folder.records or not path.is_file():
        raise ArtifactError(f"{folder.path} holds no bundle.", "Name the archive that `slope-compile bundle` wrote.")
    contents = read_contents(path.read_bytes(), str(path))
    if folder.records[STAGE].key.get("bundle") != identity_of(contents):
        raise ArtifactError(f"{path} was edited after the bundle was unpacked.", "Name the archive instead.")
    return contents
