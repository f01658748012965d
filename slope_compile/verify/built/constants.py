"""Whether an engine's bytes hold the codes and scales of the placed file: told without running it.

TensorRT-RTX 1.7 keeps integer constants as they are given: INT4 packed as ONNX packs it, INT8 a byte each; in the
stored order of axes, channels last, or turned; for INT8 products with zeros up to a whole number of channels, and
matrices that read one input beside each other, row by row. Scales that are not merged with an activation's stay
float32. Found so in engines for SM 7.5 to 12.1: convolutions in 1 to 3 dimensions, grouped, transposed, and matrices
of even and odd sizes. Other versions may do otherwise, and TensorRT lays weights out for its kernels: not looked at.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.build.holding import MAX_PADDING, PADDED, TOGETHER
from slope_compile.placement.rules import CODED, INT8
from slope_compile.qdq.reader import iter_weights
from slope_compile.qdq.tensors import element_bits
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.verdict import listed

TRIED = ((1, 7),)  # versions of TensorRT-RTX of which the above was seen
NONZEROS = 16  # codes that are not 0, fewer of which may be anywhere by chance; of scales: floats
MOST_ABSENT = 3  # after so many nothing more is looked for: it is another engine, and each costs the whole file
MOST_PLACES = 256  # a weight, where a part of it is and all of it is compared: a hostile engine has one at each byte
_MAGIC = b"vtrt"
_VERSION_AT = 24  # bytes: major, minor, patch, build
_ANCHOR = 32  # bytes that are looked for before all of a constant is compared
_NEAR = 1 << 20  # constants lie one behind the other: looked for here first, before and behind the last one
_FARTHEST = 64  # rows of a shared constant are at most so many times their own length apart
Row = Mapping[str, Any]
Array = npt.NDArray[Any]


@dataclass
class Constants:
    """What was found of the weights that the engine is said to hold.

    Args:
        looked_for: Weights with enough codes to be told from others.
        found: Those whose codes, and scales where they stay apart, are in the engine.
        absent: What is not, in words.
        unseen: What was not looked for, or not to the end, and why; empty: all was.
    """

    looked_for: int = 0
    found: int = 0
    absent: list[str] = field(default_factory=list)
    unseen: str = ""


def find_constants(engine: Path, placed: Path, rows: Mapping[str, Row], header: Mapping[str, Any]) -> Constants:
    """Look in an engine for the weights that its layer list says it holds as they were placed.

    Memory is bounded by some copies of the largest weight; the engine is mapped, and searched where the last constant
    was found before it is searched from its beginning.

    Args:
        engine: The engine.
        placed: The file that the backend got.
        rows: Of layers.json, by name.
        header: Of layers.json: its backend and version.
    """
    result = Constants()
    if header.get("backend") != "tensorrt-rtx":
        result.unseen = "the bytes of the engine's constants: TensorRT lays them out for its kernels"
    elif not engine.stat().st_size:
        result.absent.append(f"{engine.name} is empty")
    else:
        with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if not _tried(data, str(header.get("version"))):
                result.unseen = f"the bytes of the engine's constants: not tried with version {header.get('version')}"
            else:
                _look(_Engine(data), engine.name, placed, rows, result)
    return result


def _tried(data: mmap.mmap, version: str) -> bool:
    """Whether the engine or its header is of a version whose constants are known; one of the two may be forged."""
    own = tuple(data[_VERSION_AT : _VERSION_AT + 2]) if data[: len(_MAGIC)] == _MAGIC else ()
    return own in TRIED or any(version.startswith(f"{major}.{minor}.") for major, minor in TRIED)


def _look(engine: _Engine, name: str, placed: Path, rows: Mapping[str, Row], result: Constants) -> None:
    untold = any(row["placement"] in CODED and row["engine"]["dtype"] is None for row in rows.values())
    unseen: list[str] = []
    for weight in iter_weights(placed):
        row = rows.get(weight.name)
        if row is None or row["placement"] not in CODED or not row["engine"]["held"] or weight.codes is None:
            continue
        if np.count_nonzero(weight.codes) < NONZEROS or any(step.kind == "reshape" for step in weight.steps):
            continue
        engine.places = MOST_PLACES
        try:
            missing = _missing(engine, weight, weight.codes, row)
        except _TooManyPlacesError:
            unseen.append(f"{weight.name}: parts of it are at more than {MOST_PLACES} places of {name}")
            missing = []
        else:
            if missing and _is_shared(row["engine"], untold):
                if _has_short_rows(weight.codes, element_bits(weight.dtype)):
                    unseen.append(f"{weight.name}: its rows in a constant with others are under {_ANCHOR} bytes")
                continue
            result.looked_for += 1
            result.found += not missing
        if missing:
            result.absent.append(f"{weight.name}: its {' and '.join(missing)} are not in {name}")
        if len(result.absent) == MOST_ABSENT:
            break
        del weight  # the next one is read into what this one had
    if unseen:
        result.unseen = f"the bytes of the engine's constants: {listed(unseen)}"


def _missing(engine: _Engine, weight: CodedWeight, codes: Array, row: Row) -> list[str]:
    """Return which of a weight's codes and scales are not in an engine."""
    missing = []
    if not engine.holds_codes(codes, element_bits(weight.dtype), row["engine"]["bytes"]):
        missing.append("codes")
    if row["placement"] not in INT8 and not engine.holds_scale(weight):
        missing.append("scales")
    return missing


def _is_shared(told: Mapping[str, Any], untold: bool) -> bool:
    """Whether the constant may hold several weights: it is said so, or it is larger and others are nowhere.

    Rows of such constants are found if they are whole bytes, and enough; 4-bit ones of odd lengths are not looked for.
    """
    note = told["note"] or ""
    return TOGETHER in note or (PADDED in note and untold)


class _TooManyPlacesError(Exception):
    """More places than are compared look like a weight."""


class _Engine:
    """Bytes to look in, and where the last thing was found.

    Attributes:
        places: How many more places are compared before it is given up.
    """

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._last = data, 0
        self.places = MOST_PLACES
        self._order: dict[int, int] = {}  # number of axes -> which of the layouts it was the last time

    def holds_codes(self, codes: Array, bits: int, size: int) -> bool:
        """Whether codes of so many bits are there, with zeros behind an axis where their constant's size says so."""
        elements = size * 8 // bits
        if codes.size < elements and any(self._find(_packed(padded, bits)) for padded in _padded(codes, elements)):
            return True
        return self._find_turned(codes, bits) or self._find_rows(codes, bits)

    def holds_scale(self, weight: CodedWeight) -> bool:
        """Whether float32 scales are there; true of those that are too few to be told from others."""
        scale = weight.scale
        return scale is None or scale.size < NONZEROS or any(self._find(one.tobytes()) for one in _layouts(scale))

    def _find_turned(self, codes: Array, bits: int) -> bool:
        layouts = list(_layouts(codes))
        first = min(self._order.get(codes.ndim, 0), len(layouts) - 1)
        for index in sorted(range(len(layouts)), key=lambda index: index != first):
            if self._find(_packed(layouts[index], bits)):
                self._order[codes.ndim] = index
                return True
        return False

    def _find_rows(self, codes: Array, bits: int) -> bool:
        """Whether rows are there at equal distances: several matrices that became one constant."""
        if codes.ndim != 2:
            return False
        for layout in _layouts(codes):
            whole = layout.shape[1] * bits % 8 == 0
            if whole and not _is_short(layout, bits) and self._find_spread([_packed(row, bits) for row in layout]):
                return True
        return False

    def _find_spread(self, rows: list[bytes]) -> bool:
        marked = [index for index, row in enumerate(rows) if len(row) - row.count(0) >= min(NONZEROS, len(row) // 2)]
        if len(marked) < 2:
            return False
        first, second = marked[:2]
        length, steps = len(rows[0]), second - first
        at = self._data.find(rows[first])
        while at >= 0:
            self._count()
            farthest = at + steps * _FARTHEST * length + length
            other = self._data.find(rows[second], at + steps * length, farthest)
            apart, odd = divmod(other - at, steps)
            start = at - first * apart
            if other >= 0 and not odd and start >= 0 and self._has_rows(rows, start, apart):
                return True
            at = self._data.find(rows[first], at + 1)
        return False

    def _has_rows(self, rows: list[bytes], start: int, apart: int) -> bool:
        places = range(start, start + apart * len(rows), apart)
        return all(self._data[at : at + len(row)] == row for at, row in zip(places, rows, strict=True))

    def _find(self, raw: bytes) -> bool:
        """Whether bytes are there; where is kept."""
        near = max(0, self._last - len(raw) - _NEAR), self._last + len(raw) + _NEAR
        for begin, end in (near, (0, len(self._data))):
            at = self._at(raw, begin, min(end, len(self._data)))
            if at >= 0:
                self._last = at
                return True
        return False

    def _at(self, raw: bytes, begin: int, end: int) -> int:
        """Return where bytes are between two places, or -1."""
        offset = _anchor(raw)
        anchor = raw[offset : offset + _ANCHOR]
        at = self._data.find(anchor, begin + offset, end)
        while at >= 0:
            self._count()
            start = at - offset
            if self._data[start : start + len(raw)] == raw:
                return start
            at = self._data.find(anchor, at + 1, end)
        return -1

    def _count(self) -> None:
        if not self.places:
            raise _TooManyPlacesError
        self.places -= 1


def _is_short(matrix: Array, bits: int) -> bool:
    """Whether rows are too short to be looked for: they may be at many places."""
    return int(matrix.shape[1]) * bits < _ANCHOR * 8


def _has_short_rows(codes: Array, bits: int) -> bool:
    return codes.ndim == 2 and any(_is_short(layout, bits) for layout in _layouts(codes))


def _anchor(raw: bytes) -> int:
    """Return where the part lies that is looked for: of some, the one with the most different bytes."""
    places = range(0, max(1, len(raw) - _ANCHOR), max(1, len(raw) // 64))
    return max(places, key=lambda at: (raw[at] != 0, len(set(raw[at : at + _ANCHOR]))))


def _packed(codes: Array, bits: int) -> bytes:
    """Return codes as they are stored: a byte each, or two in one, the first in the low bits."""
    flat = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    nibbles = flat & 15
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return bytes(nibbles[::2] | nibbles[1::2] << 4)


def _layouts(array: Array) -> Iterator[Array]:
    """Yield an array as it is, channels last, turned, and with its first axis last, whichever differ in memory."""
    axes, seen = tuple(range(array.ndim)), set()
    for order in (axes, (*axes[:1], *axes[2:], *axes[1:2]), axes[::-1], (*axes[1:], *axes[:1])):
        memory = tuple(axis for axis in order if array.shape[axis] > 1)
        if memory not in seen:
            seen.add(memory)
            yield array.transpose(order)


def _padded(codes: Array, elements: int) -> Iterator[Array]:
    """Yield codes with zeros behind one or two axes, in every layout, where that makes as many elements."""
    for one, other in itertools.combinations(range(codes.ndim), 2):
        rest = codes.size // (codes.shape[one] * codes.shape[other])
        for extent in range(codes.shape[one], codes.shape[one] + MAX_PADDING + 1):
            more, odd = divmod(elements, rest * extent)
            if odd or not 0 <= more - codes.shape[other] <= MAX_PADDING:
                continue
            width = [(0, 0)] * codes.ndim
            width[one], width[other] = (0, extent - codes.shape[one]), (0, more - codes.shape[other])
            yield from _layouts(np.pad(codes, width))
