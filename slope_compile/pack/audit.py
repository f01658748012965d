"""A header is believed when its numbers add up: to the shapes, to each other and to the bytes that the file has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from slope_compile.pack.dtypes import MODEL_TYPES, ONNX_BITS, SMALL, small_range
from slope_compile.pack.header import (
    ALLOWANCE,
    INFLATION,
    CodedEntry,
    Codes,
    FileEntry,
    Header,
    Numbers,
    TensorEntry,
    elements_of,
    streams_of,
)
from slope_compile.pack.layouts import run_sizes
from slope_compile.pack.names import require_file_names
from slope_compile.recipe import parse_pattern

FLOAT32 = 4  # bytes


def audit(header: Header, sections: int, size: int) -> None:
    """Raise unless a header is in order.

    Args:
        header: What the file says.
        sections: Bytes of the file behind the header.
        size: Bytes of the file.

    Raises:
        ValueError: If something does not add up.
    """
    if sum(section.stored for section in header.sections) != sections:
        raise ValueError(f"its sections do not add up to the {sections} bytes behind the header")
    _audit_sections(header)
    for coded in header.coded:
        _named(coded.name, _audit_coded, coded)
    for tensor in header.tensors:
        _named(tensor.name, _audit_tensor, tensor, header.content)
    if header.content == "model":
        if header.files:
            raise ValueError("a model has no files")
        _require_ascending([entry.name for entry in header.coded])
        _require_ascending([entry.name for entry in header.tensors])
        if both := {entry.name for entry in header.coded} & {entry.name for entry in header.tensors}:
            raise ValueError(f"'{min(both)}' is there twice")
    else:
        _audit_files(header)
    unpacked = sum(_unpacked(entry, header.content) for entry in header.entries)
    if unpacked > ALLOWANCE + INFLATION * size:
        raise ValueError(f"its {size} bytes would unpack to {unpacked}: no model does")


def tensor_bytes(entry: TensorEntry, content: str) -> int:
    """Return how many bytes a tensor has where it came from.

    Raises:
        ValueError: If its type is none that is packed.
    """
    elements = elements_of(entry.shape)
    if content == "model":
        if entry.dtype not in MODEL_TYPES:
            raise ValueError(f"element type '{entry.dtype}'")
        return elements * MODEL_TYPES[entry.dtype].itemsize
    if entry.dtype not in ONNX_BITS:
        raise ValueError(f"element type '{entry.dtype}'")
    return -(-elements * ONNX_BITS[entry.dtype] // 8)


def width_of(entry: TensorEntry, content: str) -> int:
    """Return the bytes of one element, 1 where several share a byte."""
    return MODEL_TYPES[entry.dtype].itemsize if content == "model" else max(1, ONNX_BITS[entry.dtype] // 8)


def _unpacked(entry: CodedEntry | TensorEntry | FileEntry, content: str) -> int:
    """Return the bytes of an entry in memory: constant codes take none in the file."""
    if isinstance(entry, CodedEntry):
        return elements_of(entry.shape) + FLOAT32 * entry.shape[entry.axis]
    if isinstance(entry, TensorEntry):
        return max(elements_of(entry.shape), tensor_bytes(entry, content))
    return sum(raw for _, raw in entry.rest.streams)


def _audit_sections(header: Header) -> None:
    """Each section is held by something, in order of first use, and as long as the runs in it."""
    seen = 0
    for entry in header.entries:
        if entry.section > seen or entry.section >= len(header.sections):
            raise ValueError(f"'{entry.name}' is in section {entry.section}, where {seen} comes next")
        seen = max(seen, entry.section + 1)
        streams = streams_of(entry)
        if any(stored > raw for stored, raw in streams):
            raise ValueError(f"'{entry.name}' is stored in more bytes than it has")
        if sum(stored for stored, _ in streams) != header.sections[entry.section].stored:
            raise ValueError(f"the runs of '{entry.name}' do not fill section {entry.section}")
    if seen != len(header.sections):
        raise ValueError(f"nothing is in section {seen}")


def _audit_coded(entry: CodedEntry) -> None:
    elements_of(entry.shape)
    low, high = -(2 ** (entry.bits - 1)), 2 ** (entry.bits - 1) - 1
    if entry.axis >= len(entry.shape):
        raise ValueError(f"scales run along axis {entry.axis} of shape {entry.shape}")
    if entry.pattern is not None:
        parse_pattern(entry.pattern)
    _audit_codes(entry.codes, entry.shape, low, high)
    if entry.codes.groups is not None and entry.codes.groups.zero:
        raise ValueError(f"its codes are sparse around {entry.codes.groups.zero}")
    _audit_numbers(entry.scale, FLOAT32 * entry.shape[entry.axis], FLOAT32)


def _audit_tensor(entry: TensorEntry, content: str) -> None:
    size = tensor_bytes(entry, content)
    if entry.codes is not None and entry.numbers is None and content == "onnx" and entry.dtype in SMALL:
        _audit_codes(entry.codes, entry.shape, *small_range(entry.dtype))
    elif entry.numbers is not None and entry.codes is None:
        _audit_numbers(entry.numbers, size, width_of(entry, content))
    else:
        raise ValueError(f"it is not told how {entry.dtype} is laid out")


def _audit_codes(codes: Codes, shape: tuple[int, ...], low: int, high: int) -> None:
    if not low <= codes.low <= codes.high <= high:
        raise ValueError(f"codes from {codes.low} to {codes.high}, where {low} to {high} are possible")
    _require_sizes(codes.streams, run_sizes(codes, shape))


def _audit_numbers(numbers: Numbers, size: int, width: int) -> None:
    if numbers.planes not in (1, width):
        raise ValueError(f"{numbers.planes} planes of elements of {width} bytes")
    _require_sizes(numbers.streams, [size // numbers.planes] * numbers.planes)


def _require_sizes(streams: Sequence[tuple[int, int]], sizes: list[int]) -> None:
    if [raw for _, raw in streams] != sizes:
        raise ValueError(f"runs of {[raw for _, raw in streams]} bytes, where {sizes} are needed")


def _audit_files(header: Header) -> None:
    """The files take the tensors one after the other, and are as long as what they are made of."""
    if header.coded or not header.files:
        raise ValueError("ONNX has files, and no coded tensors of its own")
    require_file_names([file.name for file in header.files])
    sizes = iter([tensor_bytes(tensor, "onnx") for tensor in header.tensors])
    for file in header.files:
        rest = sum(raw for _, raw in file.rest.streams)
        _audit_numbers(file.rest, rest, 1)
        held = sum(size for _, size in zip(file.gaps, sizes, strict=False))
        if sum(file.gaps) > rest or held + rest != file.size:
            raise ValueError(f"'{file.name}' is said to have {file.size} bytes, and is made of {held + rest}")
    if sum(len(file.gaps) for file in header.files) != len(header.tensors):
        raise ValueError("its files do not take its tensors")


def _require_ascending(names: list[str]) -> None:
    for first, second in pairwise(names):
        if first >= second:
            raise ValueError(f"'{second}' comes behind '{first}'")


def _named(name: str, check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from None
