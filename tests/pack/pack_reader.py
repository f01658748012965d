"""A second reader of packed files, after docs/packing.md: plain loops, and nothing of slope_compile."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import struct
from typing import Any

import zstandard


class Reader:
    """A packed file, all of it in memory."""

    def __init__(self, data: bytes) -> None:
        assert data[:8] == b"\x89SLOPE\r\n"
        version, length, raw = struct.unpack("<3L", data[8:20])
        stored = data[52 : 52 + length]
        assert version == 1 and hashlib.sha256(data[:20] + stored).digest() == data[20:52]
        text = stored if length == raw else zstandard.ZstdDecompressor().decompress(stored)
        assert len(text) == raw
        self.header = json.loads(text)
        at = 52 + length
        self.sections = []
        for section in self.header["sections"]:
            self.sections.append(data[at : at + section["stored"]])
            assert hashlib.sha256(self.sections[-1]).hexdigest() == section["sha256"]
            at += section["stored"]
        assert at == len(data)

    def runs(self, entry: Any, *parts: str) -> list[bytes]:
        """Return the runs of an entry's parts."""
        data, found = self.sections[entry["section"]], []
        for stored, raw in [stream for part in parts for stream in entry[part]["streams"]]:
            run, data = data[:stored], data[stored:]
            found.append(run if stored == raw else zstandard.ZstdDecompressor().decompress(run))
            assert len(found[-1]) == raw
        assert not data
        return found

    def coded(self) -> dict[str, tuple[list[int], list[float]]]:
        """Return name -> (codes, scales), both flat."""
        found = {}
        for entry in self.header["coded"]:
            runs = self.runs(entry, "codes", "scale")
            count = len(entry["codes"]["streams"])
            scale = plain_numbers(runs[count:])
            values = [struct.unpack_from("<f", scale, i)[0] for i in range(0, len(scale), 4)]
            found[entry["name"]] = plain_codes(entry["codes"], entry["shape"], runs[:count]), values
        return found

    def tensors(self) -> list[bytes]:
        """Return the bytes of all other tensors, as they were where they came from."""
        found = []
        for entry in self.header["tensors"]:
            if entry["codes"] is None:
                found.append(plain_numbers(self.runs(entry, "numbers")))
            else:
                codes = plain_codes(entry["codes"], entry["shape"], self.runs(entry, "codes"))
                found.append(in_onnx(codes, entry["dtype"]))
        return found

    def files(self) -> dict[str, bytes]:
        """Return name -> bytes."""
        tensors, found = iter(self.tensors()), {}
        for entry in self.header["files"]:
            rest = plain_numbers(self.runs(entry, "rest"))
            data = b""
            for gap in entry["gaps"]:
                data += rest[:gap] + next(tensors)
                rest = rest[gap:]
            found[entry["name"]] = data + rest
            assert hashlib.sha256(found[entry["name"]]).hexdigest() == entry["sha256"]
        return found


def plain_numbers(runs: list[bytes]) -> bytes:
    return bytes(itertools.chain.from_iterable(zip(*runs, strict=True)))


def plain_digits(data: bytes, base: int, count: int) -> list[int]:
    if base == 1:
        return [0] * count
    each = 1
    while base ** (each + 1) <= 256:
        each += 1
    digits = []
    for byte in data:
        for _ in range(each):
            digits.append(byte % base)
            byte //= base
        assert byte == 0
    assert not any(digits[count:])
    return digits[:count]


def plain_codes(spec: Any, shape: list[int], runs: list[bytes]) -> list[int]:
    """Return codes in C order."""
    low, high, groups = spec["low"], spec["high"], spec["groups"]
    elements = math.prod(shape)
    if groups is None:
        return [low + digit for digit in plain_digits(runs[0], high - low + 1, elements)]
    n, m, zero = groups["n"], groups["m"], groups["zero"]
    masks = sorted(sum(1 << i for i in places) for k in range(n + 1) for places in itertools.combinations(range(m), k))
    count = -(-elements // m)
    values = [value for value in range(low, high + 1) if value != zero]
    kept = iter([values[digit] for digit in plain_digits(runs[1], high - low, groups["nonzeros"])])
    flat = []
    for rank in plain_digits(runs[0], len(masks), count):
        flat += [next(kept) if masks[rank] >> place & 1 else zero for place in range(m)]
    assert next(kept, None) is None
    axis = groups["axis"]
    if axis is None:
        return flat[:elements]
    # `flat` runs over the other axes in their order, the axis of the groups last
    order = [a for a in range(len(shape)) if a != axis] + [axis]
    codes = [0] * elements
    for value, index in zip(flat, itertools.product(*(range(shape[a]) for a in order)), strict=True):
        place = dict(zip(order, index, strict=True))
        offset = 0
        for a, length in enumerate(shape):
            offset = offset * length + place[a]
        codes[offset] = value
    return codes


def in_onnx(codes: list[int], dtype: str) -> bytes:
    """Return codes as raw_data has them: the first one in the low bits."""
    bits = int(dtype.removeprefix("U").removeprefix("INT"))
    each = 8 // bits
    padded = codes + [0] * (-len(codes) % each)
    return bytes(
        sum((code % 2**bits) << bits * i for i, code in enumerate(padded[start : start + each]))
        for start in range(0, len(padded), each)
    )
