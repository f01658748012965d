"""Archives that are damaged or hostile: each refused with its name and a remedy, and nothing left behind."""

from __future__ import annotations

import json
import random
import shutil
import stat
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bundle_files import index_with, make_bundle, rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slope_compile.bundle.archive as archive_module
import slope_compile.bundle.pack as pack_module
from slope_compile.bundle.archive import opened_bundle, prove, unpack
from slope_compile.bundle.contents import INDEX, Contents
from slope_compile.bundle.pack import write_bundle
from slope_compile.errors import ArtifactError, StorageError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contents]:
    return make_bundle(tmp_path_factory.mktemp("good"))


def refusal(path: Path, folder: Path) -> str:
    """What `unpack` says of a bad archive; the folder above the one that is written to stays as it was."""
    out = folder / "out"
    out.mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(ArtifactError) as told:
        unpack(path, out)
    assert sorted(folder.iterdir()) == before
    assert all(p.is_file() and not p.is_symlink() for p in out.iterdir())
    assert path.name in told.value.problem
    assert told.value.remedy
    return told.value.problem


def test_the_same_files_give_the_same_bytes(good: Any, tmp_path: Path) -> None:
    again, _ = make_bundle(tmp_path)
    assert again.read_bytes() == good[0].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_every_file_comes_back(good: Any, tmp_path: Path) -> None:
    path, contents = good
    assert unpack(path, tmp_path) == contents
    assert {p.name for p in tmp_path.iterdir()} == {INDEX, *contents.files}
    for name in contents.files:
        assert (tmp_path / name).read_bytes() == (path.parent / name).read_bytes()


def test_a_plain_zip_tool_reads_it(good: Any) -> None:
    with zipfile.ZipFile(good[0]) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[1:] == sorted(good[1].files)
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_a_file_that_changed_while_it_was_bundled_is_refused(good: Any, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in good[1].files}
    for name in files:
        shutil.copy(good[0].parent / name, tmp_path)
    files["model.onnx"].write_bytes(b"another")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        write_bundle(tmp_path / "out.zip", good[1], files)
    assert not list(tmp_path.glob("*out.zip*"))


def test_two_commands_may_write_one_archive(good: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first reads back what it wrote."""
    out, files = tmp_path / "out.zip", {name: good[0].parent / name for name in good[1].files}

    def and_the_other(path: Path) -> Contents:
        monkeypatch.setattr(pack_module, "prove", prove)
        write_bundle(out, good[1], files)
        return prove(path)

    monkeypatch.setattr(pack_module, "prove", and_the_other)
    write_bundle(out, good[1], files)
    assert prove(out) == good[1]
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]


def test_ctrl_c_leaves_the_archive_that_was_there(good: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_module, "prove", press)
    (tmp_path / "out.zip").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "out.zip", good[1], {name: good[0].parent / name for name in good[1].files})
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.zip", b"old")]


def test_one_flipped_bit_is_refused_or_changes_nothing(good: Any, tmp_path: Path) -> None:
    path, contents = good
    data, random_bit = path.read_bytes(), random.Random(0)
    damaged = tmp_path / "damaged.zip"
    for index in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[index] ^= 1 << random_bit.randrange(8)
        damaged.write_bytes(flipped)
        try:
            assert prove(damaged) == contents, index
        except ArtifactError as error:
            assert "damaged.zip" in error.problem


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_cut_spliced_and_overwritten_archives_never_crash(good: Any, tmp_path: Path, data: st.DataObject) -> None:
    path, contents = good
    original = path.read_bytes()
    start = data.draw(st.integers(0, len(original)))
    end = data.draw(st.integers(start, len(original)))
    filling = data.draw(st.binary(max_size=40))
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(original[:start] + filling + original[end:])
    try:
        assert prove(damaged) == contents
    except ArtifactError as error:
        assert "damaged.zip" in error.problem


@pytest.mark.parametrize(
    "name",
    ["../evil", "/etc/evil", "a/../../evil", "..", "C:evil", "C:\\evil", "..\\evil", "sub/model.onnx", "sub/", "evil",
     "Model.onnx", "", "x" * 300],
)  # fmt: skip
def test_other_names_are_refused(good: Any, tmp_path: Path, name: str) -> None:
    bad = rewritten(good[0], tmp_path / "bad.zip", {name: b"evil"})
    assert "which no bundle does" in refusal(bad, tmp_path)


def test_a_name_with_a_null_is_refused(good: Any, tmp_path: Path) -> None:
    """zipfile reads a name up to its first null byte."""
    bad = rewritten(good[0], tmp_path / "bad.zip", {"model.onnx#.exe": b"evil"})
    bad.write_bytes(bad.read_bytes().replace(b"onnx#", b"onnx\0"))
    assert "which no bundle does" in refusal(bad, tmp_path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_special_files_are_refused(good: Any, tmp_path: Path, kind: int) -> None:
    bad = rewritten(good[0], tmp_path / "bad.zip", {"model.onnx": b"/etc/passwd"}, external_attr=(kind | 0o777) << 16)
    assert "'model.onnx' is a link or a device" in refusal(bad, tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["model.onnx", INDEX])
def test_a_name_that_is_there_twice_is_refused(good: Any, tmp_path: Path, name: str) -> None:
    bad = tmp_path / "bad.zip"
    shutil.copy(good[0], bad)
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr(name, b"another")
    assert f"holds '{name}' twice" in refusal(bad, tmp_path)


def test_other_ways_of_packing_are_refused(good: Any, tmp_path: Path) -> None:
    bad = rewritten(good[0], tmp_path / "bad.zip", {"model.onnx": b"x" * 99}, compress_type=zipfile.ZIP_BZIP2)
    assert "packed in a way that no bundle is" in refusal(bad, tmp_path)


def test_an_encrypted_file_is_refused(good: Any, tmp_path: Path) -> None:
    data = bytearray(good[0].read_bytes())
    for signature, offset in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        data[data.index(signature) + offset] |= 1
    (tmp_path / "bad.zip").write_bytes(data)
    assert "packed in a way" in refusal(tmp_path / "bad.zip", tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.onnx": b"model.onnx" * 20 + b"!"}, "'model.onnx' has 201 bytes, bundle.json says 200"),
        ({"model.onnx": b"MODEL.onnx" * 20}, "model.onnx has 200 bytes with sha256"),
        ({"model.onnx": None}, "'model.onnx' is in bundle.json only"),
        ({"placed.data": b"more"}, "'placed.data' is in the archive only"),
        ({INDEX: None}, "it has no bundle.json"),
        ({INDEX: b"{"}, "bundle.json is not JSON"),
        ({INDEX: b"[" * 100_000}, "bundle.json is not JSON"),
        ({INDEX: b"\xff\xfe\0"}, "bundle.json is not JSON"),
        ({INDEX: b"{}"}, "its bundle.json is of something else"),
        ({INDEX: b"[1]"}, "its bundle.json is of something else"),
        ({INDEX: b" " * (2**20 + 1)}, "bundle.json has more than 1048576 bytes"),
    ],
)
def test_what_is_not_what_the_index_says_is_refused(good: Any, tmp_path: Path, changes: Any, told: str) -> None:
    assert told in refusal(rewritten(good[0], tmp_path / "bad.zip", changes), tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"format": 2, "made_by": "9.1"}, "is a bundle of format 2; this slope-compile reads format 1"),
        ({"format": "1"}, "format"),
        ({"format": True}, "format"),
        ({"kind": "another"}, "of something else"),
        ({"backend": "evil"}, "backend"),
        ({"surplus": 1}, "surplus"),
        ({"versions": []}, "versions"),
        ({"versions": [{"system": "JetPack 6", "from": "x", "below": "y"}]}, "versions"),
        ({"name": "x" * 2000}, "name"),
        ({"target": "thor"}, "it is for thor, and its build for orin"),
        ({"target": "../../evil"}, "target"),
        ({"target": "orin\n"}, "target"),
        ({"files": {}}, "it lists no codes.safetensors"),
        ({"build": {"targets": ["orin"], "batch": {"min": 4, "max": 2}}}, "build"),
        ({"build": {"targets": ["orin"], "batch": {"max": 2**31}}}, "build.batch.max"),
        ({"allowed": {"relative": -1, "derivation": "x"}}, "allowed"),
        ({"accuracies": {"fp32": 1, "x": 2}}, "accuracies"),
        ({"planned_for": "soon"}, "planned for soon, which is no version"),
        ({"build": {"targets": ["orin"], "timing_cache": "/dev/zero"}}, "names the timing cache /dev/zero"),
        ({"made_by": "9" * 900, "surplus": 1}, "surplus"),
        ({"made_by": "9" * 5000}, "made_by"),
        ({"made_by": "9." * 2000 + "x"}, "made_by"),
        ({"format": 10**4000, "made_by": [1]}, "is a bundle of format 1000"),
        ({"format": [[1]]}, "has the format list"),
    ],
)
def test_an_index_that_says_other_things_is_refused(good: Any, tmp_path: Path, changed: Any, told: str) -> None:
    bad = rewritten(good[0], tmp_path / "bad.zip", {INDEX: index_with(good[0], **changed)})
    assert told in refusal(bad, tmp_path)


def test_a_key_that_a_later_version_added_asks_for_that_version(good: Any, tmp_path: Path) -> None:
    index = index_with(good[0], made_by="99.1", another=1)
    bad = rewritten(good[0], tmp_path / "bad.zip", {INDEX: index})
    with pytest.raises(ArtifactError, match="another") as told:
        prove(bad)
    assert "Install slope-compile 99.1" in told.value.remedy


def test_no_nesting_of_values_crashes(good: Any, tmp_path: Path) -> None:
    """One level short of what json refuses, writing the value out would be one too deep."""
    for depth in range(880, 1000, 3):
        nested = f'{{"kind": "slope-compile bundle", "format": {"[" * depth}{"]" * depth}, "made_by": 1}}'
        assert INDEX in refused(rewritten(good[0], tmp_path / "bad.zip", {INDEX: nested.encode()}))


def refused(path: Path) -> str:
    with pytest.raises(ArtifactError) as told:
        prove(path)
    return told.value.problem


@pytest.mark.parametrize("size", [-1, 2**34, 1.5, "200", None])
def test_absurd_sizes_are_refused(good: Any, tmp_path: Path, size: object) -> None:
    index = json.loads(index_with(good[0]))
    index["files"]["model.onnx"]["size"] = size
    bad = rewritten(good[0], tmp_path / "bad.zip", {INDEX: json.dumps(index).encode()})
    assert "files.model.onnx.size" in refusal(bad, tmp_path)


def test_a_strange_listed_name_is_refused(good: Any, tmp_path: Path) -> None:
    index = json.loads(index_with(good[0]))
    index["files"]["../evil"] = index["files"]["model.onnx"]
    bad = rewritten(good[0], tmp_path / "bad.zip", {INDEX: json.dumps(index).encode()})
    assert "it lists '../evil'" in refusal(bad, tmp_path)


def test_a_bomb_is_refused_before_it_is_inflated(good: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_module, "MIN_ALLOWANCE", 1000)
    index = json.loads(index_with(good[0]))
    index["files"]["model.onnx"]["size"] = 3_000_000
    bomb = {"model.onnx": bytes(3_000_000), INDEX: json.dumps(index).encode()}
    assert "would unpack to" in refusal(rewritten(good[0], tmp_path / "bad.zip", bomb), tmp_path)
    assert not list((tmp_path / "out").iterdir())


def test_a_member_that_gives_more_than_it_declares_is_refused(good: Any, tmp_path: Path) -> None:
    """Both size fields say 200 bytes, the stream has a thousand times as many."""
    bad = rewritten(good[0], tmp_path / "bad.zip", {"model.onnx": bytes(200_000)})
    data = bad.read_bytes().replace(struct.pack("<L", 200_000), struct.pack("<L", 200))
    bad.write_bytes(data)
    assert "model.onnx" in refusal(bad, tmp_path)
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) < 5000


def test_a_huge_directory_is_not_read(good: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        for number in range(500):
            archive.writestr(f"{number}", b"")
    assert "more files than any has" in refusal(bad, tmp_path)


def test_a_huge_directory_told_in_64_bits_is_not_read(good: Any, tmp_path: Path) -> None:
    data = good[0].read_bytes()
    end = data[-22:]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2**40, 2**40, 2**40, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22, 1)
    (tmp_path / "bad.zip").write_bytes(data[:-22] + record + locator + end)
    assert "more files than any has" in refusal(tmp_path / "bad.zip", tmp_path)


@pytest.mark.parametrize("data", [b"", b"PK", b"\x7fELF" + bytes(200), b"PK\5\6" + bytes(18), bytes(5000)])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "other.zip").write_bytes(data)
    assert "not a bundle" in refusal(tmp_path / "other.zip", tmp_path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for path, told in ((tmp_path / "none.zip", "does not exist"), (tmp_path, "is not a file")):
        with pytest.raises(ArtifactError, match=told), opened_bundle(path):
            pass


def test_too_little_room_is_told_before_anything_is_written(
    good: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(StorageError, match="MiB free"):
        unpack(good[0], tmp_path)
    assert not list(tmp_path.iterdir())
