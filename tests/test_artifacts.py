from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from slope_compile import artifacts
from slope_compile.artifacts import FileDigest, RunFolder, storage_errors, write_atomically
from slope_compile.errors import ArtifactError, StorageError

KEY = {"recipe": "r1"}


WRITTEN = {"build/a100": "build/a100/model.engine", "pack": "model.slope"}  # a folder, and one file


def make(folder: RunFolder, text: str, stage: str = "build/a100") -> None:
    partial = folder.fresh_partial(stage)
    (partial / Path(WRITTEN[stage]).name).write_text(text)
    (partial / "build.log").write_text("took 1 s")
    folder.commit(stage, KEY, {"wall_s": 1.0}, logs=("build.log",))


def test_commit_records_outputs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "one")
    again = RunFolder(tmp_path)
    assert again.records["build/a100"].outputs == {
        "build/a100/model.engine": FileDigest.of(tmp_path / "build/a100/model.engine")
    }
    assert again.why_stale("build/a100", KEY) is None
    assert {p.name for p in (tmp_path / "build").iterdir()} == {"a100"}
    assert (tmp_path / "build/a100/build.log").exists()


def test_a_stage_of_one_file_has_it_at_the_top_of_the_run(tmp_path: Path) -> None:
    for text in ("one", "two"):
        make(RunFolder(tmp_path), text, "pack")
        again = RunFolder(tmp_path)
        assert again.require("pack").outputs == {"model.slope": FileDigest.of(tmp_path / "model.slope")}
        assert again.stage_path("pack").read_text() == text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "model.slope"]
    assert again.unlisted("pack") == []


def test_what_lies_where_a_stage_puts_its_file_makes_way(tmp_path: Path) -> None:
    (tmp_path / "model.slope").mkdir()
    (tmp_path / "model.slope" / "note").write_text("a folder of somebody's")
    make(RunFolder(tmp_path), "one", "pack")
    assert (tmp_path / "model.slope").read_text() == "one"


def test_why_stale_names_the_reason(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.why_stale("build/a100", KEY) == "not made yet"
    make(folder, "one")
    assert folder.why_stale("build/a100", {"recipe": "r2"}) == "changed: recipe"
    (tmp_path / "build/a100/model.engine").unlink()
    assert folder.why_stale("build/a100", KEY) == "build/a100/model.engine is missing"


@pytest.mark.parametrize("text", ["ona", "on", ""])
def test_an_edited_or_truncated_output_is_refused(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "one")
    (tmp_path / "build/a100/model.engine").write_text(text)
    for ask in (lambda: folder.why_stale("build/a100", KEY), lambda: folder.require("build/a100")):
        with pytest.raises(ArtifactError, match=r"model\.engine"):
            ask()


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def operations() -> list[tuple[object, str]]:
    files = [(Path, "rename"), (Path, "replace"), (Path, "unlink")]
    return [*files, (artifacts, "sync"), (artifacts.shutil, "rmtree")]


@pytest.mark.parametrize("stage", WRITTEN)
@pytest.mark.parametrize("survived", range(15))
def test_killed_between_any_two_operations_the_old_or_the_new_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survived: int, stage: str
) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "old", stage)
    left = [survived]

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for owner, name in operations():
            patch.setattr(owner, name, dying(getattr(owner, name)))
        try:
            make(folder, "new", stage)
            finished = True
        except Killed:
            finished = False
    again = RunFolder(tmp_path)
    with again.locked():
        assert again.why_stale(stage, KEY) is None
    text = (tmp_path / WRITTEN[stage]).read_text()
    assert text in ("old", "new")
    assert text == "new" or not finished
    assert not list(tmp_path.glob("**/.*.old"))


def test_killed_before_its_first_commit_was_listed_no_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "one")

    def kill(self: RunFolder) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFolder, "_write_manifest", kill)
        make(folder, "new", "pack")
    assert (tmp_path / "model.slope").is_file()
    again = RunFolder(tmp_path)
    with again.locked():
        assert not (tmp_path / "model.slope").exists()
        make(again, "new", "pack")
    assert (tmp_path / "model.slope").read_text() == "new"


@pytest.mark.parametrize("stage", WRITTEN)
def test_the_sweep_above_reaches_the_end_of_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = RunFolder(tmp_path)
    make(folder, "old", stage)
    calls = []
    for owner, name in operations():
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _real=real, **k: (calls.append(1), _real(*a, **k))[1])
    make(folder, "new", stage)
    assert 8 <= len(calls) <= 14


def test_a_second_process_is_refused_while_the_folder_is_held(tmp_path: Path) -> None:
    with RunFolder(tmp_path).locked(), pytest.raises(StorageError, match="Another"), RunFolder(tmp_path).locked():
        pass


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 99, "stages": {}}', '{"format": 1, "stages": {"train": {"key": {}}}}',
             '{"format": 1, "stages": {"train": {"key": {}, "outputs": {"../x": {"size": 1, "sha256": "a"}}}}}',
             '{"format": 1, "stages": {"train": {"key": {}, "outputs": {"x": {"size": Infinity, "sha256": "a"}}}}}',
             '{"format": 1, "stages": {"\\ud800": {"key": {}, "outputs": {}}}}']
)  # fmt: skip
def test_a_damaged_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="manifest"):
        RunFolder(tmp_path)


def test_existing_wants_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a run folder"):
        RunFolder.existing(tmp_path)
    with pytest.raises(ArtifactError, match="does not exist"):
        RunFolder.existing(tmp_path / "nowhere")


def test_a_full_disk_names_path_and_free_space(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"x\.bin.*MiB free.*Free some space"), storage_errors(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x.bin"))


def test_write_atomically_keeps_the_old_text_when_the_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError):
        write_atomically(path, json.dumps({"new": 1}))
    assert path.read_text() == "old"
