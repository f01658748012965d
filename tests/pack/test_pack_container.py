"""A packed file that lies, in any byte and in any number of its header: whatever it says ends in an ArtifactError."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx_nets import coded, save
from pack_files import MAGIC, edited, header_of, random_codes, sections_of, with_header
from pydantic import ValidationError

import slope_compile as sc
from slope_compile.errors import ArtifactError, LaterFormatError
from slope_compile.pack.header import Header
from slope_compile.pack.kept import KeptTensors
from slope_compile.pack.read import open_packed
from slope_compile.pack.write import _packed_model, pack_onnx

EMPTY = {"name": "x", "size": 0, "sha256": "0" * 64, "section": 0, "gaps": []} | {
    "rest": {"planes": 1, "streams": [[0, 0]]}
}
CODES = {
    "a.weight": random_codes((8, 16, 3, 3), 4, (2, 4)),
    "b.weight": random_codes((40, 31), 3, seed=1),
    "c.weight": random_codes((3, 4), 8, seed=2),
}
TENSORS = {"a.bias": np.linspace(0, 1, 300).astype("<f4"), "n": np.array(7), "flag": np.array([True, False])}
TYPES = {"a.bias": "F32", "n": "I64", "flag": "BOOL"}


@pytest.fixture(scope="module")
def packed_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("packed") / "m.slope"
    state = {
        f"{name.removesuffix('.weight')}.parametrizations.weight.{part}": "F32"
        for name in CODES
        for part in ("original", "0.step")
    }
    _packed_model(CODES, KeptTensors(TYPES | state, TENSORS.__getitem__, CODES, "it"), out)
    return out.read_bytes()


@pytest.fixture(scope="module")
def packed_onnx(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("onnx")
    codes = CODES["a.weight"]
    tensors, node = coded("w", codes.codes, codes.scale, "INT4", axis=0)
    save(folder / "m.onnx", [node, helper.make_node("Conv", ["x", "w"], ["y"])], tensors, [1, 16, 9, 9], "y")
    pack_onnx(folder / "m.onnx", folder / "m.slope")
    return (folder / "m.slope").read_bytes()


def read_all(data: bytes, folder: Path) -> Any:
    path = folder / "it.slope"
    path.write_bytes(data)
    packed = open_packed(path)
    packed.check()
    codes = {
        name: (c.codes.tobytes(), c.scale.tobytes(), c.bits, c.axis, c.pattern) for name, c in packed.codes.items()
    }
    return codes, {name: (array.tobytes(), array.dtype, array.shape) for name, array in packed.tensors.items()}


def test_the_first_bytes_by_hand(tmp_path: Path) -> None:
    """One coded tensor whose parts are stored as they are; the header's text is written out here."""
    one = sc.CodedTensor(np.array([[1, 0, 0, -2]], np.int8), np.array([0.5], np.float32), 3, 0, (2, 4))
    state = {"parametrizations.weight.original": "F32", "parametrizations.weight.0.step": "F32"}
    _packed_model({"weight": one}, KeptTensors(state, TENSORS.__getitem__, ["weight"], "it"), tmp_path / "m.slope")
    # codes -2 to 1 as digits of base 4: 3, 2, 2, 0, the first one lowest
    section = bytes([3 + 4 * 2 + 16 * 2 + 64 * 0]) + struct.pack("<f", 0.5)
    text = (
        '{"content":"model","sections":[{"stored":5,"sha256":"' + hashlib.sha256(section).hexdigest() + '"}],'
        '"coded":[{"name":"weight","section":0,"shape":[1,4],"bits":3,"axis":0,"pattern":"2:4",'
        '"codes":{"low":-2,"high":1,"groups":null,"streams":[[1,1]]},"scale":{"planes":1,"streams":[[4,4]]}}],'
        '"tensors":[],"files":[]}'
    ).encode()
    stored = zstandard.ZstdCompressor(level=19, write_checksum=False).compress(text)
    begin = bytes.fromhex("89534c4f50450d0a 01000000") + struct.pack("<2L", len(stored), len(text))
    expected = begin + hashlib.sha256(begin + stored).digest() + stored + section
    assert (tmp_path / "m.slope").read_bytes() == expected
    (tmp_path / "plain.slope").write_bytes(with_header(expected, text))  # a header stored as it is
    assert np.array_equal(open_packed(tmp_path / "plain.slope").codes["weight"].codes, one.codes)


@pytest.mark.parametrize("content", ["model", "onnx"])
def test_cut_off_at_any_byte_it_is_refused(
    content: str, packed_model: bytes, packed_onnx: bytes, tmp_path: Path
) -> None:
    data = packed_model if content == "model" else packed_onnx
    read_all(data, tmp_path)
    for size in [*range(0, 60), *range(60, len(data), 97), len(data) - 1]:
        with pytest.raises(ArtifactError):
            read_all(data[:size], tmp_path)
    with pytest.raises(ArtifactError, match="do not add up"):
        read_all(data + b"\0", tmp_path)


@pytest.mark.parametrize("content", ["model", "onnx"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_flipped_byte_goes_unseen(
    content: str, packed_model: bytes, packed_onnx: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    good = packed_model if content == "model" else packed_onnx
    place, mask = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(1, 255))
    bad = bytearray(good)
    bad[place] ^= mask
    with pytest.raises(ArtifactError):
        read_all(bytes(bad), tmp_path)


def places(header: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of everything in a header."""
    items = header.items() if isinstance(header, dict) else enumerate(header) if isinstance(header, list) else ()
    return [path] + [place for key, value in items for place in places(value, (*path, key))]


VALUES = [
    None, True, -1, 0, 1, 2, 7, 64, 255, 256, 2**31, 2**48, 2**63, 2**64, 10**30, 0.5, 1e308, "", "x", "..", "2:4",
    "1:64", "99:99", "F32", "INT4", "BYTES", "0" * 64, [], [[]], [[0, 0]], [[2**40, 2**40]], {}, {"x": 1}, [0] * 70,
    [2**47, 2],
]  # fmt: skip


@pytest.mark.parametrize("content", ["model", "onnx"])
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_header_that_says_something_else_is_refused_or_means_the_same(
    content: str, packed_model: bytes, packed_onnx: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    """Its digest is in order: somebody made it so. What still reads gives lawful tensors and no other exception."""
    good = packed_model if content == "model" else packed_onnx
    header = header_of(good)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(places(header)))
        if not path:
            continue
        parent = header
        for key in path[:-1]:
            parent = parent[key]
        action = data.draw(st.sampled_from(["set", "remove", "double", "nudge"]))
        value = parent[path[-1]]
        if action == "remove":
            del parent[path[-1]]
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(value))
        elif action == "nudge" and isinstance(value, int):
            parent[path[-1]] = value + data.draw(st.sampled_from([-1, 1]))
        else:
            parent[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))
    try:
        codes, _ = read_all(with_header(good, header), tmp_path)
    except ArtifactError:
        return
    assert all(bits <= 8 for _, _, bits, _, _ in codes.values())


def test_headers_that_are_no_json_are_refused(packed_model: bytes, tmp_path: Path) -> None:
    text = json.dumps(header_of(packed_model), separators=(",", ":")).encode()
    read_all(with_header(packed_model, text), tmp_path)
    for bad in (
        b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"NaN", text + b" ", b" " + text, text[:-1],
        b"[" * 100_000, b'{"a":' * 100_000, text.replace(b'"bits":4', b'"bits":4.0'),
        text.replace(b'"bits":4', b'"bits":NaN'),
        text.replace(b'"bits":4', b'"bits":4,"bits":4'), text.replace(b'"bits":4', b'"bits":' + b"9" * 5000),
        text.replace(b'"content"', b'"Content"'), text.replace(b"a.weight", b"a.\\ud800"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match="damaged"):
            read_all(with_header(packed_model, bad), tmp_path)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda h: h["sections"][0].update(stored=10**9), "do not add up"),
        (lambda h: h["sections"].reverse(), "do not fill section"),
        (lambda h: h["sections"].append({"stored": 0, "sha256": "0" * 64}), "nothing is in section"),
        (lambda h: h["coded"].reverse(), "comes next"),
        (lambda h: h["coded"][1].update(name="a.weight"), "comes behind"),
        (lambda h: h["tensors"][0].update(name="a.weight"), "there twice"),
        (lambda h: h["coded"][0].update(shape=[2**40, 2**40]), "a tensor of shape"),
        (lambda h: h["coded"][0].update(axis=4), "axis 4"),
        (lambda h: h["coded"][0].update(bits=2), "codes from -8"),
        (lambda h: h["coded"][0].update(pattern="3:2"), "no n:m pattern"),
        (lambda h: h["coded"][0].update(pattern="1:4"), "nonzeros in a group"),
        (lambda h: h["tensors"][0].update(dtype="F99"), "element type"),
        (lambda h: h["tensors"][1].update(dtype="I64", shape=[2]), "are needed"),
        (lambda h: h["tensors"][0].update(numbers=None), "do not fill"),
        (lambda h: h.update(content="onnx"), "element type 'F32'"),
        (lambda h: h["files"].append(EMPTY), "has no files|do not fill"),
        (lambda h: h.update(more=1), "which no part of it has"),
        (lambda h: h["coded"][0]["codes"]["streams"].append([0, 0]), "are needed"),
        (lambda h: h["coded"][0]["codes"].update(streams=[[9, 1], [0, 0]]), "more bytes than it has|do not fill"),
    ],
)  # fmt: skip
def test_what_does_not_add_up_is_told(
    edit: Callable[[Any], object], told: str, packed_model: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactError, match=told) as raised:
        read_all(edited(packed_model, edit), tmp_path)
    assert "it.slope" in str(raised.value) or "weight" in str(raised.value)


def one_tensor(stored: bytes, raw: int, shape: list[int]) -> bytes:
    """A file of one BYTES-like tensor, U8."""
    numbers = {"planes": 1, "streams": [[len(stored), raw]]}
    header = {
        "content": "model",
        "sections": [{"stored": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}],
        "coded": [],
        "tensors": [{"name": "x", "section": 0, "shape": shape, "dtype": "U8", "codes": None, "numbers": numbers}],
        "files": [],
    }
    return with_header(b"", header, stored)


def test_a_bomb_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    small = zstandard.compress(bytes(2**20))
    assert read_all(one_tensor(small, 2**20, [2**20]), tmp_path)
    with pytest.raises(ArtifactError, match="would unpack"):
        read_all(one_tensor(small, 2**31, [2**31]), tmp_path)
    with pytest.raises(ArtifactError, match="a zstd frame of 1048576 bytes stands where 1048575 should"):
        read_all(one_tensor(small, 2**20 - 1, [2**20 - 1]), tmp_path)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
    with pytest.raises(ArtifactError, match="stands where"):
        read_all(one_tensor(unsized, 2**20, [2**20]), tmp_path)
    # a frame that says 1000 bytes and holds more: its block is inflated into 1000 bytes at most
    said = zstandard.frame_content_size(zstandard.compress(bytes(1000)))
    assert said == 1000
    for behind in (b"x", zstandard.compress(b""), zstandard.compress(bytes(1000))):
        with pytest.raises(ArtifactError, match="zstd"):
            read_all(one_tensor(zstandard.compress(bytes(1000)) + behind, 1000, [1000]), tmp_path)
    header = MAGIC + struct.pack("<3L", 1, 100, 2**25)
    with pytest.raises(ArtifactError, match="is said to have"):
        read_all(header + hashlib.sha256(header).digest() + bytes(100), tmp_path)


def test_constant_codes_that_take_no_bytes_are_counted(packed_model: bytes, tmp_path: Path) -> None:
    codes = {"low": 0, "high": 0, "groups": None, "streams": [[0, 0]]}
    numbers = {"planes": 1, "streams": [[4, 4]]}
    entry = {"name": "x", "section": 0, "bits": 4, "axis": 0, "pattern": None, "codes": codes, "scale": numbers}
    scale = struct.pack("<f", 1)
    header = header_of(packed_model) | {
        "tensors": [],
        "sections": [{"stored": 4, "sha256": hashlib.sha256(scale).hexdigest()}],
    }
    for shape in ([1, 2**20], [1, 2**32], [1, 2**48]):
        order = ("name", "section", "shape", "bits", "axis", "pattern", "codes", "scale")
        header["coded"] = [{key: (entry | {"shape": shape})[key] for key in order}]
        data = with_header(b"", header, scale)
        if shape[1] == 2**20:
            assert read_all(data, tmp_path)
        else:
            with pytest.raises(ArtifactError, match="would unpack"):
                read_all(data, tmp_path)


def test_a_bomb_in_the_header_is_refused(tmp_path: Path) -> None:
    text = zstandard.compress(b" " * 2**25)
    for raw in (2**25, 2**24):
        begin = MAGIC + struct.pack("<3L", 1, len(text), raw)
        with pytest.raises(ArtifactError):
            read_all(begin + hashlib.sha256(begin + text).digest() + text, tmp_path)


@pytest.mark.parametrize(
    ("key", "item", "told"),
    [
        ("sections", b"{}", "an object with the 0 keys"),
        ("coded", b'{"":0}', "an object with the 1 keys"),
        ("tensors", b"[]", "more lists than"),
        ("files", b"-1", "files.0"),
        ("sections", b'""', "sections.0"),
    ],
)
def test_the_first_of_many_bad_items_is_told_and_no_other_is_kept(
    key: str, item: bytes, told: str, packed_model: bytes, tmp_path: Path
) -> None:
    """16 MiB of them are a file of 1.5 kB; an error for each would take gigabytes."""
    items = b"[" + b",".join([item] * 20_000) + b"]"
    text = json.dumps(header_of(packed_model) | {key: 0}, separators=(",", ":")).encode()
    text = text.replace(f'"{key}":0'.encode(), f'"{key}":'.encode() + items, 1)
    with pytest.raises(ArtifactError, match=told):
        read_all(with_header(packed_model, text), tmp_path)
    with pytest.raises(ValidationError) as raised:
        Header.model_validate_json(text)
    assert raised.value.error_count() < 20


def test_many_sizes_and_unknown_keys_end_at_the_first(packed_model: bytes, packed_onnx: bytes, tmp_path: Path) -> None:
    gaps = edited(packed_onnx, lambda h: h["files"][0].update(gaps=[-1] * 20_000))
    with pytest.raises(ArtifactError, match=r"files\.0\.gaps\.0: Input should be greater"):
        read_all(gaps, tmp_path)
    with pytest.raises(ValidationError) as raised:
        Header.model_validate_json(json.dumps(header_of(gaps)))
    assert raised.value.error_count() == 1
    more = edited(packed_model, lambda h: h.update({f"key {index}": 0 for index in range(20_000)}))
    with pytest.raises(ArtifactError, match="20005 keys") as refused:
        read_all(more, tmp_path)
    assert len(str(refused.value)) < 1000


def test_other_files_and_formats_are_refused(packed_model: bytes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_packed(tmp_path / "none.slope")
    with pytest.raises(ArtifactError, match="is not a file"):
        open_packed(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ArtifactError, match="is not a file"):
        open_packed(tmp_path / "fifo")
    for other in (b"PK\3\4" + bytes(100), b"x"):
        with pytest.raises(ArtifactError, match=r"is no packed file: it does not begin as one does\. Name a file"):
            read_all(other, tmp_path)
    with pytest.raises(LaterFormatError, match=r"format 2, this version reads 1\. Update slope-compile"):
        read_all(packed_model[:8] + b"\2" + packed_model[9:], tmp_path)
    text_mode = packed_model.replace(b"\r\n", b"\n", 1)
    for bad, told in {
        text_mode: "it was copied as text", packed_model[:8] + b"\0" + packed_model[9:]: "format 0", b"": "cut off",
    }.items():  # fmt: skip
        with pytest.raises(ArtifactError, match=f"is damaged: .*{told}.* Copy the file again"):
            read_all(bad, tmp_path)


def test_a_bool_is_true_or_false(tmp_path: Path) -> None:
    data = one_tensor(b"\2", 1, [1])
    with pytest.raises(ArtifactError, match="neither true nor false"):
        read_all(edited(data, lambda h: h["tensors"][0].update(dtype="BOOL")), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../../x", "", ".", "a//b", "a/./b", "C:x", "a\\b", "x\0", "x\n", "é" * 200, "a/", "\u202ex"],
)
def test_no_file_leaves_the_folder(name: str, packed_onnx: bytes, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no name of a file below a folder"):
        read_all(edited(packed_onnx, lambda h: h["files"][0].update(name=name)), tmp_path)


def test_no_file_is_in_another_ones_way(packed_onnx: bytes, tmp_path: Path) -> None:
    empty = hashlib.sha256(b"").hexdigest()

    def more(name: str) -> Callable[[Any], None]:
        def edit(header: Any) -> None:
            header["sections"].append({"stored": 0, "sha256": empty})
            index, rest = len(header["sections"]) - 1, {"planes": 1, "streams": [[0, 0]]}
            header["files"].append(
                {"name": name, "size": 0, "sha256": empty, "section": index, "gaps": [], "rest": rest}
            )

        return edit

    for name in ("M.onnx", "m.onnx", "m.onnx/x"):
        with pytest.raises(ArtifactError, match="same name"):
            read_all(edited(packed_onnx, more(name)), tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "it.slope").write_bytes(edited(packed_onnx, more("sub/x")))
    with pytest.raises(ArtifactError, match="is a link"):
        open_packed(tmp_path / "it.slope").restore(tmp_path / "out")
    (tmp_path / "it.slope").write_bytes(edited(packed_onnx, more("sub/deep/x")))
    with pytest.raises(ArtifactError, match="is a link"):
        open_packed(tmp_path / "it.slope").restore(tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    (tmp_path / "out/sub").unlink()
    (tmp_path / "out/sub").write_bytes(b"")
    with pytest.raises(ArtifactError, match="sub exists and is no folder"):
        open_packed(tmp_path / "it.slope").restore(tmp_path / "out")
    (tmp_path / "out/sub").unlink()
    (tmp_path / "out/m.onnx").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="exists already"):
        open_packed(tmp_path / "it.slope").restore(tmp_path / "out")
    (tmp_path / "out/m.onnx").unlink()
    assert [path.read_bytes() for path in open_packed(tmp_path / "it.slope").restore(tmp_path / "out")][1] == b""


def test_a_file_that_would_be_restored_otherwise_leaves_nothing(packed_onnx: bytes, tmp_path: Path) -> None:
    bad = edited(packed_onnx, lambda h: h["files"][0].update(sha256="0" * 64))
    with pytest.raises(ArtifactError, match="would be restored with sha256"):
        read_all(bad, tmp_path)
    with pytest.raises(ArtifactError, match="would be restored"):
        open_packed(tmp_path / "it.slope").restore(tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()
    assert sections_of(bad) == sections_of(packed_onnx)
