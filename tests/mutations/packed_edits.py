"""A packed file taken apart, changed and put together again, signed as `pack` signs it: what a forger does."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import zstandard
from mutation import Corrupt, Subject

from slope_compile.compression.codes import CodedTensor
from slope_compile.pack.container import Sections, write_container
from slope_compile.pack.entries import add_coded, add_tensor, as_bytes
from slope_compile.pack.header import CodedEntry, Header
from slope_compile.pack.layouts import encode_codes
from slope_compile.pack.numbers import encode_numbers
from slope_compile.pack.read import open_packed

PACKED = "model.slope"
Made = Callable[[Sections, str, CodedTensor], Any]
Entry = dict[str, Any]


@dataclass
class Content:
    """What a packed model holds.

    Args:
        codes: By name.
        tensors: Name -> (safetensors' name of the element type, values).
        add: How a coded tensor is written.
    """

    codes: dict[str, CodedTensor]
    tensors: dict[str, tuple[str, Any]]
    add: Made = field(default=add_coded)


def repacked(edit: Callable[[Content], object]) -> Corrupt:
    """Return what changes a packed model's tensors; every digest is made again."""

    def corrupt(subject: Subject) -> None:
        path = subject.file(PACKED)
        packed = open_packed(path)
        codes = {name: packed.codes[name] for name in packed.codes}
        content = Content(codes, {name: (packed.tensors.dtype(name), packed.tensors[name]) for name in packed.tensors})
        edit(content)
        path.write_bytes(written(content))

    return corrupt


def written(content: Content) -> bytes:
    """Return the file of a packed model, its laws not looked at."""
    sections_file, out = BytesIO(), BytesIO()
    sections = Sections(sections_file)
    coded = tuple(content.add(sections, name, content.codes[name]) for name in sorted(content.codes))
    tensors = tuple(add_tensor(sections, name, *content.tensors[name]) for name in sorted(content.tensors))
    sections_file.seek(0)
    header = Header(content="model", sections=sections.table, coded=coded, tensors=tensors, files=())
    write_container(header, sections_file, out)
    return out.getvalue()


_BEGIN, _DIGEST = struct.Struct("<8s3L"), 32


@dataclass
class Opened:
    """The parts of a packed file; the digests follow when it is closed.

    Args:
        header: As JSON is read.
        sections: The bytes of each.
    """

    header: dict[str, Any]
    sections: list[bytes]

    @classmethod
    def of(cls, data: bytes) -> Opened:
        """Take a file apart."""
        _, _, kept, raw = _BEGIN.unpack_from(data)
        at = _BEGIN.size + _DIGEST + kept
        text = data[at - kept : at]
        header = json.loads(text if kept == raw else zstandard.decompress(text))
        sections = []
        for section in header["sections"]:
            sections.append(data[at : at + section["stored"]])
            at += section["stored"]
        return cls(header, sections)

    def entry(self, name: str) -> Entry:
        """Return what the header says of a tensor or a file."""
        lists = (self.header["coded"], self.header["tensors"], self.header["files"])
        return next(entry for entries in lists for entry in entries if entry["name"] == name)

    def close(self, text: bytes | None = None, version: int = 1, compressed: bool = False) -> bytes:
        """Return the file; its sections' sizes and digests, and the header's, are those of the bytes.

        Args:
            text: The header's text; None: the JSON of `header`.
            version: Of the format.
            compressed: Whether the header is a zstd frame whatever its size.
        """
        if text is None:
            for section, data in zip(self.header["sections"], self.sections, strict=True):
                section.update(stored=len(data), sha256=hashlib.sha256(data).hexdigest())
            text = json.dumps(self.header, separators=(",", ":"), ensure_ascii=False).encode()
        kept = zstandard.compress(text) if compressed else text
        begin = _BEGIN.pack(b"\x89SLOPE\r\n", version, len(kept), len(text))
        return begin + hashlib.sha256(begin + kept).digest() + kept + b"".join(self.sections)


def resigned(edit: Callable[[Opened], object], **how: Any) -> Corrupt:
    """Return what changes header or sections; the digests follow."""

    def corrupt(subject: Subject) -> None:
        path = subject.file(PACKED)
        opened = Opened.of(path.read_bytes())
        edit(opened)
        path.write_bytes(opened.close(**how))

    return corrupt


def retold(change: Callable[[bytes], bytes]) -> Corrupt:
    """Return what changes the header's text; its digest follows, the sections stay."""

    def corrupt(subject: Subject) -> None:
        path = subject.file(PACKED)
        opened = Opened.of(path.read_bytes())
        text = json.dumps(opened.header, separators=(",", ":"), ensure_ascii=False).encode()
        path.write_bytes(opened.close(change(text)))

    return corrupt


def restored_streams(change: Callable[[bytes], bytes]) -> Corrupt:
    """Return what stores every run anew: as what `change` makes of its bytes, where that is shorter than they are."""

    def edit(opened: Opened) -> None:
        for entry in (*opened.header["coded"], *opened.header["tensors"]):
            data, kept, at = opened.sections[entry["section"]], [], 0
            parts = [entry[part] for part in ("codes", "scale", "numbers") if entry.get(part)]
            for stream in (stream for part in parts for stream in part["streams"]):
                stored, raw = stream
                run = data[at : at + stored]
                whole = run if stored == raw else zstandard.decompress(run)
                again = change(whole)
                kept.append(again if len(again) < raw else whole)
                at, stream[0] = at + stored, len(kept[-1])
            opened.sections[entry["section"]] = b"".join(kept)

    return resigned(edit)


def grouped(sizes: tuple[int, ...]) -> Corrupt:
    """Return what packs the coded tensors anew, in groups of other sizes."""

    def add(sections: Sections, name: str, coded: CodedTensor) -> CodedEntry:
        codes, runs = encode_codes(coded.codes, sizes=sizes)
        scale, scale_runs = encode_numbers(as_bytes(coded.scale), 4)
        return CodedEntry(
            name=name,
            section=sections.add([*runs, *scale_runs]),
            shape=coded.codes.shape,
            bits=coded.bits,
            axis=coded.axis,
            pattern=coded.pattern and f"{coded.pattern[0]}:{coded.pattern[1]}",
            codes=codes,
            scale=scale,
        )

    return repacked(lambda content: setattr(content, "add", add))
