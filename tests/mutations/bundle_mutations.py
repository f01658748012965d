"""Mutations of a bundle: its archive, and what a device unpacked and built of it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import onnx
from graph_mutations import behind, no_bias, without
from mutation import Corrupt, Mutation, Subject
from onnx_edits import Edit, Net, with_weight
from weight_kinds import CORE

from slope_compile.artifacts import FileDigest
from slope_compile.bundle.contents import INDEX
from slope_compile.bundle.pack import EPOCH

Members = dict[str, bytes]
BUNDLE, UNPACKED = "bundle", "unpacked bundle"
BOTH = ("pattern", "codes")


def _row(kind: str, corrupt: Corrupt, *by: str, code: int = 1, says: str = "") -> Mutation:
    return Mutation(kind, BUNDLE, corrupt, frozenset(by), BUNDLE, code, says, forged=False, naive=False)


def _refused(kind: str, corrupt: Corrupt, says: str) -> Mutation:
    return _row(kind, corrupt, code=2, says=says)


def read(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, members: Mapping[str, bytes], **entry: Any) -> None:
    """Write an archive; `entry` sets attributes of every member."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            for attribute, value in entry.items():
                setattr(info, attribute, value)
            archive.writestr(info, data)


def _naive(edit: Callable[[Members], object]) -> Corrupt:
    """Change members and leave bundle.json as it is."""

    def corrupt(subject: Subject) -> None:
        members = read(subject.path)
        edit(members)
        write(subject.path, members)

    return corrupt


def _forged(edit: Callable[[Members], object]) -> Corrupt:
    """Change members, and make bundle.json match."""

    def change(members: Members) -> None:
        edit(members)
        index = json.loads(members[INDEX])
        for name in index["files"]:
            digest = _digest(members[name])
            index["files"][name] = {"size": digest.size, "sha256": digest.sha256}
        members[INDEX] = json.dumps(index).encode()

    return _naive(change)


def _digest(data: bytes) -> FileDigest:
    import hashlib

    return FileDigest(len(data), hashlib.sha256(data).hexdigest())


def _onnx(name: str, edit: Edit) -> Corrupt:
    def change(members: Members) -> None:
        net = Net(onnx.load(BytesIO(members[name])))
        edit(net)
        members[name] = net.model.SerializeToString()

    return _forged(change)


def _from_run(name: str, run: str, file: str) -> Corrupt:
    def corrupt(subject: Subject) -> None:
        _forged(lambda members: members.update({name: (subject.runs[run] / file).read_bytes()}))(subject)

    return corrupt


def _index(edit: Callable[[Any], object]) -> Corrupt:
    def change(members: Members) -> None:
        index = json.loads(members[INDEX])
        edit(index)
        members[INDEX] = json.dumps(index).encode()

    return _naive(change)


def _json(name: str, edit: Callable[[Any], object]) -> Corrupt:
    def change(members: Members) -> None:
        told = json.loads(members[name])
        edit(told)
        members[name] = json.dumps(told).encode()

    return _forged(change)


def _renamed(members: Members) -> None:
    members["model2.onnx"] = members.pop("model.onnx")


def _more(name: str) -> Corrupt:
    return _naive(lambda members: members.update({name: b"more"}))


def _cut(subject: Subject) -> None:
    subject.path.write_bytes(subject.path.read_bytes()[:-30])


def _bit(subject: Subject) -> None:
    data = bytearray(subject.path.read_bytes())
    data[len(data) // 2] ^= 1
    subject.path.write_bytes(data)


def _first(rows: Any) -> Any:
    return rows["places"][1]


def _exchanged(told: Any) -> None:
    rows = told["places"]
    rows[1], rows[4] = rows[4], rows[1]


ARCHIVE = (
    [
        _row(
            f"model.onnx: {one.kind}",
            _onnx("model.onnx", with_weight(one)),
            *(BOTH if one.lawless else ("codes",)),
            "placement",
        )
        for one in CORE[:7]
    ]
    + [
        _row(
            f"placed.onnx: {one.kind}",
            _onnx("placed.onnx", with_weight(one)),
            "placement",
            *(("pattern",) if one.lawless else ()),
        )
        for one in CORE[:4]
    ]
    + [
        _row("model.onnx: bias dropped", _onnx("model.onnx", no_bias), "parity.onnx"),
        _row("model.onnx: a Relu removed", _onnx("model.onnx", without("Relu", 1)), "parity.onnx"),
        _row("model.onnx: Softmax behind the scores", _onnx("model.onnx", behind("Gemm", 0, "Softmax")), "parity.onnx"),
        _row("placed.onnx: bias dropped", _onnx("placed.onnx", no_bias), "parity.placed"),
        _row("model.onnx: another run's", _from_run("model.onnx", "other", "export/model.onnx"), "codes", "placement"),
        _row("placed.onnx: another run's", _from_run("placed.onnx", "int8", "build/a100/placed.onnx"), "placement"),
        _row(
            "codes.safetensors: another run's",
            _from_run("codes.safetensors", "other", "train/codes.safetensors"),
            "codes",
        ),
        _row(
            "golden.safetensors: another run's",
            _from_run("golden.safetensors", "other", "export/golden.safetensors"),
            "parity.onnx",
        ),
        _row("layers.json: another run's", _from_run("layers.json", "int8", "export/layers.json"), "codes"),
        _row("layers.json: other bits", _json("layers.json", lambda t: t["layers"][1].update(bits=8)), "codes"),
        _row("layers.json: a row removed", _json("layers.json", lambda t: t["layers"].pop()), "codes"),
        _row("layers.json: no JSON", _forged(lambda m: m.update({"layers.json": b"{"})), "codes"),
        _row("placement.json: a row removed", _json("placement.json", lambda t: t["places"].pop()), "placement"),
        _row(
            "placement.json: a row more", _json("placement.json", lambda t: t["places"].append(_first(t))), "placement"
        ),
        _row(
            "placement.json: another placement",
            _json("placement.json", lambda t: _first(t).update(placement="int8-weight", container="INT8")),
            "placement",
        ),
        _row(
            "placement.json: a container that the placement has not",
            _json("placement.json", lambda t: _first(t).update(container="FLOAT")),
            "placement",
        ),
        _row("placement.json: blocks", _json("placement.json", lambda t: _first(t).update(block_size=64)), "placement"),
        _row("placement.json: two rows exchanged", _json("placement.json", _exchanged), "placement"),
        _row("placement.json: no JSON", _forged(lambda m: m.update({"placement.json": b"{"})), "placement"),
        _row("golden.safetensors: empty", _forged(lambda m: m.update({"golden.safetensors": b""})), "parity.onnx"),
        _row("model.onnx: empty", _forged(lambda m: m.update({"model.onnx": b""})), *BOTH, "placement"),
    ]
    + [
        _refused(
            "a member's bytes changed",
            _naive(lambda m: m.update({"model.onnx": m["model.onnx"][:-1] + b"x"})),
            "model.onnx has",
        ),
        _refused(
            "a member cut off", _naive(lambda m: m.update({"model.onnx": m["model.onnx"][:-1]})), "bundle.json says"
        ),
        _refused("a member missing", _naive(lambda m: m.pop("model.onnx")), "in bundle.json only"),
        _refused("bundle.json missing", _naive(lambda m: m.pop(INDEX)), "no bundle.json"),
        _refused("a member renamed", _naive(_renamed), "which no bundle does"),
        _refused("a member more", _more("model.onnx.data"), "in the archive only"),
        _refused("a member of another name", _more("evil.py"), "which no bundle does"),
        _refused("a member out of the folder", _more("../model.onnx"), "which no bundle does"),
        _refused("a member with an absolute path", _more("/tmp/model.onnx"), "which no bundle does"),
        _refused(
            "members that are links", lambda s: write(s.path, read(s.path), external_attr=0o120777 << 16), "is a link"
        ),
        _refused("cut off", _cut, "is not a bundle"),
        _refused("empty", lambda s: (s.path.write_bytes(b""), None)[1], "is not a bundle"),
        _refused("no zip", lambda s: (s.path.write_text("a bundle"), None)[1], "is not a bundle"),
        _refused("a bit flipped", _bit, ""),
        _refused(
            "bundle.json: a sha256 edited",
            _index(lambda i: i["files"]["model.onnx"].update(sha256="0" * 64)),
            "model.onnx has",
        ),
        _refused(
            "bundle.json: a size edited", _index(lambda i: i["files"]["model.onnx"].update(size=1)), "bundle.json says"
        ),
        _refused("bundle.json: a file not listed", _index(lambda i: i["files"].pop("placed.onnx")), "placed.onnx"),
        _refused("bundle.json: a later format", _index(lambda i: i.update(format=2)), "format"),
        _refused("bundle.json: another kind", _index(lambda i: i.update(kind="zip")), "bundle.json"),
        _refused(
            "bundle.json: a target that leaves the folder", _index(lambda i: i.update(target="../orin")), "target"
        ),
        _refused("bundle.json: another target than its build's", _index(lambda i: i.update(target="orin")), "orin"),
        _refused(
            "bundle.json: a tolerance that is negative",
            _index(lambda i: i.update(allowed={"relative": -1, "derivation": "x"})),
            "allowed",
        ),
        _refused("bundle.json: an unknown key", _index(lambda i: i.update(more=1)), "more"),
        _refused("bundle.json: no JSON", _naive(lambda m: m.update({INDEX: b"{"})), "bundle.json"),
        _refused("bundle.json: nested 100000 deep", _naive(lambda m: m.update({INDEX: b"[" * 100_000})), "bundle.json"),
    ]
)
