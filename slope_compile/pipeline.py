"""The stages in order: which must run, why, and running them. What a stage does is its own room's business.

    train ──► export ──► build/TARGET ──► verify/TARGET
      └─────► pack ──────────────────────────┘

A stage is skipped while its key is unchanged: the recipe sections it reads, the code of its rooms, the digests of its
inputs and, for engines, the backend's version.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from slope_compile import machine
from slope_compile.artifacts import FILES, LOGS, RunFolder, read_json, storage_errors, write_atomically
from slope_compile.errors import ArtifactError
from slope_compile.events import Events
from slope_compile.recipe import Recipe, load_recipe
from slope_compile.summary import verdict_of, write_report
from slope_compile.verify.asked import Asked

TRAIN_SECTIONS = ("model", "data", "compression", "train")
SECTIONS: dict[str, tuple[str, ...]] = {
    "train": TRAIN_SECTIONS, "pack": (), "export": ("export",), "build": ("build",), "verify": ("verify",),
}  # fmt: skip
SHARED_ROOMS = ("compression", "codes_file.py")
ROOMS = {
    "train": ("train",),
    "pack": ("qdq", "pack", "tensor_file.py"),
    "export": ("qdq", "export", "train"),
    "build": ("qdq", "targets", "placement", "lint", "build"),
    "verify": ("qdq", "pack", "targets", "placement", "lint", "export", "build", "verify", "train"),
}


def is_first_process() -> bool:
    """Whether this process is the one that writes: alone, or rank 0 under torchrun or `accelerate launch`."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    stage: str
    action: Literal["done", "skipped", "would run"]
    reason: str


class Pipeline:
    """Runs stages in a run folder.

    Args:
        recipe: The resolved recipe.
        folder: Where the artifacts are.
        events: Who is told.
        force: Redo a stage even if nothing it depends on has changed.
        asked: What `verify` is asked beyond the recipe.

    Raises:
        ArtifactError: If the folder holds a run of another recipe, and not `force`.
    """

    def __init__(
        self, recipe: Recipe, folder: RunFolder, events: Events, force: bool = False, asked: Asked | None = None
    ) -> None:
        self.recipe, self.folder, self.events, self.force = recipe, folder, events, force
        self.asked = asked or Asked()
        if not force:
            refuse_other_recipe(recipe, folder)

    def stages(self, upto: str, targets: Iterable[str] | None = None) -> list[str]:
        """Return the names of the stages from the first to `upto` (or `upto` alone for the targets given)."""
        chosen = list(dict.fromkeys(targets or self.recipe.build.targets))
        names = ["train", "pack", "export", *(f"{kind}/{t}" for t in chosen for kind in ("build", "verify"))]
        return names[: names.index(upto) + 1] if upto in names else names

    def _refuse_unknown_names(self, stages: Iterable[str]) -> None:
        """Raise before anything runs: a misspelt target or check must not cost a training."""
        from slope_compile.targets.target import find_target
        from slope_compile.verify.require import parse_required

        parse_required(self.recipe.verify.require)
        for target in (*self.recipe.build.targets, *(s.partition("/")[2] for s in stages if "/" in s)):
            find_target(target)

    def run(self, stages: Sequence[str]) -> list[Outcome]:
        """Run the named stages, in order, skipping what is unchanged; then write the report.

        Raises:
            SlopeCompileError: As the stages do; what was committed before stays.
        """
        self._refuse_unknown_names(stages)
        if not is_first_process():
            return [self._join_training(stage) for stage in stages if stage == "train"]
        if "train" in stages:  # a setting of one `verify` or `build` is not the run's recipe
            write_atomically(self.folder.path / "recipe.yaml", self.recipe.to_yaml())
        outcomes = [self._run_one(stage) for stage in stages]
        self._report()
        return outcomes

    def _report(self) -> None:
        """Write the report; files that were committed and make no sense leave none, and the verdict as it is."""
        try:
            write_report(self.folder)
        except (
            ArtifactError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError
        ) as error:  # fmt: skip
            (self.folder.path / "report.html").unlink(missing_ok=True)
            self.events.warning("report", f"not written, what it draws is damaged: {type(error).__name__}: {error}")

    def plan(self, stages: Sequence[str]) -> list[Outcome]:
        """Say what `run` would do, and why; nothing is written."""
        self._refuse_unknown_names(stages)
        outcomes: list[Outcome] = []
        stale: set[str] = set()
        for stage in stages:
            upstream = [name for name in _upstream(stage) if name in stale]
            reason = "forced" if self.force else None
            if reason is None and upstream:
                reason = f"'{upstream[0]}' will be made anew"
            reason = reason or self.folder.why_stale(stage, self._key(stage))
            if reason:
                stale.add(stage)
            outcomes.append(Outcome(stage, "would run" if reason else "skipped", reason or "unchanged"))
        return outcomes

    def _run_one(self, stage: str) -> Outcome:
        kind, _, target = stage.partition("/")
        if kind != "verify":  # the verifier reports damaged inputs as a failed check, the others refuse them
            for upstream in _upstream(stage):
                self.folder.require(upstream)
        if kind != "train":
            self._refuse_other_training()
        key = self._key(stage)
        reason = "forced" if self.force else self.folder.why_stale(stage, key)
        if reason is None and kind == "verify":
            reason = self._why_again(target)
        if reason is None:
            self.events.emit("stage_skipped", stage=stage, reason="unchanged")
            return Outcome(stage, "skipped", "unchanged")
        self.events.emit("stage_start", stage=stage, reason=reason)
        started = time.monotonic()
        machine.restart_peak_memory()
        partial = self.folder.fresh_partial(stage)
        if kind == "train":
            self._prepare_state(key)
        work: Callable[[Path, str], None] = getattr(self, f"_{kind}")
        with storage_errors(partial):
            work(partial, target)
        facts = machine.facts(started)
        self.folder.commit(stage, key, facts, LOGS)
        if kind == "train":
            shutil.rmtree(self._state, ignore_errors=True)
        self.events.emit("stage_end", stage=stage, wall_s=facts["wall_s"])
        return Outcome(stage, "done", reason)

    def _why_again(self, target: str) -> str | None:
        """Say why an unchanged verification is made again: it failed, or its verdict is none."""
        try:
            return None if verdict_of(self.folder, [target])["verdict"] == "pass" else "failed last time"
        except ArtifactError:
            return "its verdict cannot be read"

    def _refuse_other_training(self) -> None:
        """Raise if a forced training was interrupted: recipe.yaml is the new one, what is trained is the old."""
        trained = self.folder.records.get("train")
        if trained is not None and trained.key["recipe"] != self.recipe.digest(*TRAIN_SECTIONS):
            raise ArtifactError(
                f"{self.folder.path} was trained with another recipe than its recipe.yaml: a training was interrupted.",
                "Finish it with the same `slope-compile train` or `run` command.",
            )

    def _join_training(self, stage: str) -> Outcome:
        """Take part in a training that the first process leads; only that one writes."""
        reason = "forced" if self.force else self.folder.why_stale(stage, self._key(stage))
        if reason is None:
            return Outcome(stage, "skipped", "unchanged")
        self._train(self.folder.partial_path(stage), "")
        return Outcome(stage, "done", reason)

    def _prepare_state(self, key: dict[str, str]) -> None:
        """Drop what an interrupted training left if it was of other data or other code, or if all is to be redone."""
        note = self._state / "key.json"
        with storage_errors(self._state):
            if self._state.exists() and (self.force or not note.is_file() or _state_key(note) != key):
                self.events.note(
                    "train", "starting over: data, code or recipe changed since the interruption, or --force"
                )
                shutil.rmtree(self._state)
            self._state.mkdir(exist_ok=True)
            write_atomically(note, json.dumps(key))

    def _train(self, partial: Path, _: str) -> None:
        from slope_compile.train.engine import wait_for_all
        from slope_compile.train.loop import train

        wait_for_all()
        train(self.recipe, partial, self._state, self.events)

    def _pack(self, partial: Path, _: str) -> None:
        from slope_compile.pack.write import pack_run

        pack_run(self.folder.stage_path("train"), partial / FILES["pack"])

    def _export(self, partial: Path, _: str) -> None:
        from slope_compile.export.run import export_run

        export_run(self.recipe, self.folder.stage_path("train"), partial, self.events)

    def _build(self, partial: Path, target: str) -> None:
        from slope_compile.build.engine import build_run

        last = self.folder.stage_path(f"build/{target}")  # its timing cache is used again
        build_run(self.recipe.build, target, self.folder.stage_path("export"), partial, self.events, last)

    def _verify(self, partial: Path, target: str) -> None:
        from slope_compile.verify.run import verify_run

        verify_run(self.recipe, self.folder, target, partial, self.events, self.asked)

    @property
    def _state(self) -> Path:
        return self.folder.path / "train.state"

    def _key(self, stage: str) -> dict[str, str]:
        kind = stage.partition("/")[0]
        # What an engine must hold is asked of it afterwards: another requirement is no reason to build it again.
        asked = self.recipe.build.model_copy(update={"require": []})
        recipe = self.recipe.model_copy(update={"build": asked})
        key = {"recipe": recipe.digest(*SECTIONS[kind])} if SECTIONS[kind] else {}
        key["code"] = code_digest(*SHARED_ROOMS, *ROOMS[kind])
        if kind == "train":
            from slope_compile.train.sources import source_digests

            key |= source_digests(self.recipe)
        if kind == "verify":
            # A machine with another GPU can check what this one could not.
            gpus = ", ".join(f"{gpu['name']} {gpu['driver_version']}" for gpu in machine.gpus())
            key["machine"] = f"onnxruntime {machine.version_of('onnxruntime')}, GPUs: {gpus or 'none'}"
            key |= self.asked.key()  # what one command asked for is not what the next one finds done
        if kind == "build":
            from slope_compile.targets.backends import backend_version

            key["backend"] = backend_version(self.recipe.build.backend)
        for upstream in _upstream(stage):
            record = self.folder.records.get(upstream)
            digests = {} if record is None else {path: d.sha256 for path, d in record.outputs.items()}
            key |= {f"input {path}": digest for path, digest in digests.items()}
        return key


def _upstream(stage: str) -> list[str]:
    kind, _, target = stage.partition("/")
    upstream = {"train": [], "pack": ["train"], "export": ["train"], "build": ["export"]}
    return upstream.get(kind, ["train", "pack", "export", f"build/{target}"])


def _state_key(path: Path) -> object:
    try:
        return read_json(path)
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not a file of ours: {error}.", f"Delete {path.parent} to train from the start."
        ) from None


def refuse_other_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Raise if the folder's recipe differs in what was trained.

    Raises:
        ArtifactError: Naming the keys that differ.
    """
    path = folder.path / "recipe.yaml"
    if not path.is_file():
        return
    theirs = load_recipe(path).model_dump(mode="json")
    ours = recipe.model_dump(mode="json")
    differing = [
        f"{section}.{key} is {theirs[section][key]!r} there and {ours[section][key]!r} here"
        for section in TRAIN_SECTIONS
        for key in ours[section]
        if ours[section][key] != theirs[section][key]
    ]
    if differing:
        raise ArtifactError(
            f"{folder.path} belongs to another recipe: {'; '.join(differing[:4])}.",
            "Use another --out, or --force to train anew in its place.",
        )


@cache
def code_digest(*rooms: str) -> str:
    """Return the sha256 over the source files of the named rooms (folders or files of this package)."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for room in rooms:
        path = package / room
        files = [file for file in path.rglob("*") if file.suffix in (".py", ".yaml")]  # targets.yaml is code too
        for file in sorted(files) if path.is_dir() else [path]:
            digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@contextmanager
def open_run(
    path: Path, recipe: Recipe, events: Events, force: bool = False, asked: Asked | None = None
) -> Iterator[Pipeline]:
    """Make or open a run folder, hold its lock, and give its pipeline; of several processes the first holds it."""
    folder = RunFolder(path)
    with folder.locked() if is_first_process() else nullcontext():
        yield Pipeline(recipe, folder, events, force, asked)
