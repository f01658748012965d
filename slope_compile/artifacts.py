"""The run folder: what each stage made, from what, and whether it still holds.

An artifact exists only when the manifest says so. A stage works in `STAGE.partial`; `commit` syncs its files, moves the
folder into place and writes the manifest last. A process killed at any point leaves the old artifact or the new one:

    1. STAGE         -> .STAGE.old   (where there was one)
    2. STAGE.partial -> STAGE
    3. manifest.json                 (temporary name, fsync, rename)
    4. .STAGE.old removed

A stage of `FILES` makes one file at the top of the run folder; it is moved as the folders of the others are.
`recover` finishes or undoes an interrupted commit by asking which of the two the manifest describes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from slope_compile.errors import ArtifactError, StorageError

FORMAT = 1
LOCK = ".slope-compile.lock"
MAX_JSON_BYTES = 100_000_000
CHUNK = 1 << 20
FILES = {"pack": "model.slope"}  # stages that make one file, which lies at the top of the run folder
PACKED_SUFFIX = ".slope"  # how a packed file's name ends
LOGS = ("build.log",)  # of a stage: kept, but not digested: they hold times


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        """Measure a file."""
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return cls(size, digest.hexdigest())


@dataclass(frozen=True)
class Mismatch:
    """A file that is not what the manifest says; `found` is None where it is missing."""

    path: str
    expected: FileDigest
    found: FileDigest | None

    def __str__(self) -> str:
        if self.found is None:
            return f"{self.path} is missing"
        if self.found.size != self.expected.size:
            return f"{self.path} has {self.found.size} bytes, the manifest says {self.expected.size}"
        return f"{self.path} has sha256 {self.found.sha256[:12]}…, the manifest says {self.expected.sha256[:12]}…"


@dataclass(frozen=True)
class Record:
    """What the manifest keeps of one finished stage."""

    key: dict[str, str]  # what the stage depends on: recipe sections, code, inputs, backend; equal key = still fresh
    outputs: dict[str, FileDigest]  # path inside the run folder -> digest
    facts: dict[str, Any]  # versions, machine, wall time, peak memory: told, never compared

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's form."""
        outputs = {path: {"size": d.size, "sha256": d.sha256} for path, d in sorted(self.outputs.items())}
        return {"key": self.key, "outputs": outputs, **self.facts}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Record:
        """Read the manifest's form; raises KeyError, TypeError, ValueError or OverflowError if it is another."""
        outputs = {str(p): FileDigest(int(d["size"]), str(d["sha256"])) for p, d in raw["outputs"].items()}
        if any(Path(path).is_absolute() or ".." in Path(path).parts for path in outputs):
            raise ValueError("an output path leaves the run folder")
        facts = {name: value for name, value in raw.items() if name not in ("key", "outputs")}
        return cls({str(k): str(v) for k, v in raw["key"].items()}, outputs, facts)


class RunFolder:
    """One run: its folder, its manifest, its stages (`train`, `pack`, `export`, `build/TARGET`, `verify/TARGET`).

    Args:
        path: The folder; made by `locked` if missing.

    Raises:
        ArtifactError: If the manifest is unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = self._read_manifest()

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """Open a run folder that must already be one.

        Raises:
            ArtifactError: If there is no manifest.
        """
        if not (path / "manifest.json").is_file():
            state = "is not a run folder: it has no manifest.json" if path.exists() else "does not exist"
            remedy = "Name the folder that `slope-compile train` or `run` wrote."
            if path.suffix == PACKED_SUFFIX and path.is_file():
                state = "is a packed file, not a run folder"
                remedy = "Name a run folder; `unpack`, `verify` and `inspect` take the packed file."
            raise ArtifactError(f"{path} {state}.", remedy)
        return cls(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold it against other processes; a killed process lets go by itself.

        Raises:
            StorageError: If the folder cannot be made, or another process holds it.
            ArtifactError: If it holds files but was never a run folder: they may be somebody's `train/` or `build/`.
        """
        with storage_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / LOCK).exists() and not self.records and any(self.path.iterdir()):
                raise ArtifactError(
                    f"{self.path} holds files and is not a run folder.", "Name an empty or new folder with --out."
                )
            lock = (self.path / LOCK).open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(
                    f"Another slope-compile process is working in {self.path}.", "Wait for it, or use another --out."
                ) from None
            self.records = self._read_manifest()  # as it is now that nobody else writes
            self.recover()
            yield

    def stage_path(self, stage: str) -> Path:
        """Return the folder of a stage's committed files, or its one file."""
        return self.path / FILES.get(stage, stage)

    def partial_path(self, stage: str) -> Path:
        """Return the folder in which a stage works until it is committed."""
        return self.path / f"{stage}.partial"

    def fresh_partial(self, stage: str) -> Path:
        """Return the stage's working folder, emptied."""
        partial = self.partial_path(stage)
        with storage_errors(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return partial

    def why_stale(self, stage: str, key: Mapping[str, str]) -> str | None:
        """Say why a stage must run, or None if what is there still holds.

        Raises:
            ArtifactError: If an output was truncated or edited since it was committed.
        """
        record = self.records.get(stage)
        if record is None:
            return "not made yet"
        changed = sorted(name for name in {*record.key, *key} if record.key.get(name) != key.get(name))
        if changed:
            return f"changed: {', '.join(changed)}"
        mismatches = self.mismatches(stage)
        if any(m.found is None for m in mismatches):
            return f"{next(str(m) for m in mismatches if m.found is None)}"
        if mismatches:
            raise tampered(self.path, stage, mismatches)
        return None

    def mismatches(self, stage: str) -> list[Mismatch]:
        """Compare every output of a stage with the manifest (size first, then sha256)."""
        found = []
        for name, expected in sorted(self.records[stage].outputs.items()):
            path = self.path / name
            actual = FileDigest.of(path) if path.is_file() else None
            if actual != expected:
                found.append(Mismatch(name, expected, actual))
        return found

    def unlisted(self, stage: str) -> list[str]:
        """Return the files of a finished stage's folder that the manifest does not list, logs aside."""
        found = sorted(path for path in self.stage_path(stage).rglob("*") if not path.is_dir() or path.is_symlink())
        names = [path.relative_to(self.path).as_posix() for path in found if path.name not in LOGS]
        return [name for name in names if name not in self.records[stage].outputs]

    def require(self, stage: str) -> Record:
        """Return the record of a finished stage whose files still are what the manifest says.

        Raises:
            ArtifactError: If the stage is not finished, or a file of it is missing, truncated or edited.
        """
        record = self.require_record(stage)
        if mismatches := self.mismatches(stage):
            raise tampered(self.path, stage, mismatches)
        return record

    def require_record(self, stage: str) -> Record:
        """Return the record of a finished stage, whatever became of its files.

        Raises:
            ArtifactError: If the stage is not finished.
        """
        if stage not in self.records:
            command, _, target = stage.partition("/")
            how = f"slope-compile {command} {self.path}" + (f" --target {target}" if target else "")
            raise ArtifactError(f"{self.path} has no finished '{stage}'.", f"Run `{how}` first.")
        return self.records[stage]

    def commit(
        self, stage: str, key: Mapping[str, str], facts: Mapping[str, Any], logs: tuple[str, ...] = ()
    ) -> Record:
        """Make the stage's working folder its artifact.

        Args:
            stage: Whose `STAGE.partial` is complete.
            key: What it depends on.
            facts: Versions, machine, times.
            logs: File names that are kept but not digested (they hold times).
        """
        partial, final = self.partial_path(stage), self.stage_path(stage)
        made = partial / FILES[stage] if stage in FILES else partial
        old = final.with_name(f".{final.name}.old")
        with storage_errors(partial):
            outputs = {}
            for file in [made] if stage in FILES else sorted(p for p in made.rglob("*") if p.is_file()):
                sync(file)
                if file.name not in logs:
                    outputs[(final / file.relative_to(made)).relative_to(self.path).as_posix()] = FileDigest.of(file)
            for folder in [p for p in partial.rglob("*") if p.is_dir()] + [partial]:
                sync(folder)
            if final.exists():
                final.rename(old)
            made.rename(final)
            sync(final.parent)
            self.records[stage] = Record(dict(key), outputs, dict(facts))
            self._write_manifest()
            for left in (old, partial):  # of a stage that made one file, its empty folder
                with suppress(OSError):  # it is committed; what is left over does no harm
                    _remove(left)
        return self.records[stage]

    def recover(self) -> None:
        """Finish or undo commits that a kill interrupted."""
        for old in sorted([*self.path.glob(".*.old"), *self.path.glob("*/.*.old")]):
            final = old.with_name(old.name[1:].removesuffix(".old"))
            name = final.relative_to(self.path).as_posix()
            stage = next((stage for stage, file in FILES.items() if file == name), name)
            if not old.is_dir() and stage not in FILES:
                continue
            with storage_errors(old):
                if stage in self.records and not self.mismatches(stage):
                    _remove(old)
                    continue
                _remove(final)
                old.rename(final)
        for stage, name in FILES.items():
            final, partial = self.path / name, self.partial_path(stage)
            if stage not in self.records and final.is_file() and partial.is_dir() and not (partial / name).exists():
                with storage_errors(final):  # the first of its stage: moved, not yet listed
                    final.rename(partial / name)

    def _read_manifest(self) -> dict[str, Record]:
        path = self.path / "manifest.json"
        if not path.is_file():
            return {}
        remedy = "Use another --out, or delete the folder to start over."
        try:
            raw = read_json(path)
            json.dumps(raw, ensure_ascii=False).encode()  # refuses "\\ud800", half a character, which nothing can write
            if raw["format"] != FORMAT:
                raise ValueError(f"format {raw['format']!r}, this version reads {FORMAT}")
            return {str(stage): Record.from_json(record) for stage, record in raw["stages"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArtifactError(f"{path} is not a manifest of ours: {error}.", remedy) from None

    def _write_manifest(self) -> None:
        stages = {stage: record.to_json() for stage, record in sorted(self.records.items())}
        write_atomically(self.path / "manifest.json", json.dumps({"format": FORMAT, "stages": stages}, indent=1) + "\n")


def _remove(path: Path) -> None:
    """Take away a folder with all that is in it, or a file; nothing is said of one that is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tampered(folder: Path, stage: str, mismatches: list[Mismatch]) -> ArtifactError:
    """Return the error for files that are not what the manifest says."""
    what = "; ".join(str(m) for m in mismatches[:3])
    command = stage.partition("/")[0]
    return ArtifactError(
        f"{folder}: {what}. It was truncated or edited after '{stage}' finished.",
        f"Restore it, or make it anew with `slope-compile {command} … --force`.",
    )


def read_json(path: Path) -> Any:
    """Return a JSON file's contents; an error of reading is for the caller to name.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is too big, no text, no JSON, or nested too deeply.
    """
    if (size := path.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"it has {size} bytes, more than {MAX_JSON_BYTES}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader, or a crash, sees the old contents or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with storage_errors(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's or a folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a StorageError that names the path and the free space.

    safetensors reports I/O errors as its own exception: those with an operating-system error number are caught too.
    """
    try:
        yield
    except OSError as error:
        raise _storage_error(path, error.filename or path, error.strerror or str(error), error.errno) from error
    except SafetensorError as error:
        if "os error" not in str(error):
            raise
        raise _storage_error(path, path, str(error), _number(error)) from error


def _number(error: SafetensorError) -> int | None:
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _storage_error(path: Path, name: object, reason: str, number: int | None) -> StorageError:
    folder = path
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    full = number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "Free some space and run the same command again." if full else "Check the path and its permissions."
    return StorageError(f"{name}: {reason} ({free / 2**20:.0f} MiB free there).", remedy)
