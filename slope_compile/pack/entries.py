"""Tensors into sections and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from slope_compile.compression.codes import CodedTensor
from slope_compile.pack.container import Container, Sections, damage
from slope_compile.pack.digits import BLOCK, Bytes, join_digits, split_digits
from slope_compile.pack.dtypes import MODEL_TYPES, ONNX_BITS, SMALL
from slope_compile.pack.header import CodedEntry, TensorEntry, elements_of
from slope_compile.pack.layouts import GROUP_SIZES, decode_codes, encode_codes
from slope_compile.pack.numbers import decode_numbers, encode_numbers
from slope_compile.recipe import parse_pattern

Array = npt.NDArray[Any]


def as_bytes(array: Array) -> Bytes:
    """Return an array's elements as they lie, uint8, flat."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def add_coded(sections: Sections, name: str, coded: CodedTensor) -> CodedEntry:
    """Write a coded tensor that obeys the laws."""
    codes, scale = np.asarray(coded.codes), np.asarray(coded.scale)
    sizes = GROUP_SIZES if coded.pattern is None else (*GROUP_SIZES, coded.pattern[1])
    spec, runs = encode_codes(codes, sizes=sizes)
    numbers, scale_runs = encode_numbers(as_bytes(scale), scale.itemsize)
    return CodedEntry(
        name=name,
        section=sections.add([*runs, *scale_runs]),
        shape=codes.shape,
        bits=coded.bits,
        axis=coded.axis,
        pattern=None if coded.pattern is None else f"{coded.pattern[0]}:{coded.pattern[1]}",
        codes=spec,
        scale=numbers,
    )


def read_coded(container: Container, entry: CodedEntry) -> CodedTensor:
    """Return a coded tensor as numpy arrays, its laws proved.

    Raises:
        ArtifactError: If the file is damaged, or the tensor breaks a law.
    """
    runs = container.read(entry.section, [*entry.codes.streams, *entry.scale.streams])
    count = len(entry.codes.streams)
    with damage(container.path):
        coded = CodedTensor(
            codes=decode_codes(entry.codes, entry.shape, np.int8, runs[:count]),
            scale=decode_numbers(runs[count:]).view(np.float32),
            bits=entry.bits,
            axis=entry.axis,
            pattern=None if entry.pattern is None else parse_pattern(entry.pattern),
        )
    coded.check(entry.name)
    return coded


def add_tensor(sections: Sections, name: str, dtype: str, array: Array) -> TensorEntry:
    """Write any other tensor of a model, by safetensors' name of its type; the array's element has as many bytes."""
    numbers, runs = encode_numbers(as_bytes(array), array.itemsize)
    section = sections.add(runs)
    return TensorEntry(name=name, section=section, shape=array.shape, dtype=dtype, codes=None, numbers=numbers)


def read_tensor(container: Container, entry: TensorEntry) -> Array:
    """Return a tensor of a model.

    Raises:
        ArtifactError: If the file is damaged.
    """
    assert entry.numbers is not None  # audited
    raw = decode_numbers(container.read(entry.section, entry.numbers.streams))
    with damage(container.path):
        if entry.dtype == "BOOL" and raw.size and int(raw.max()) > 1:
            raise ValueError(f"'{entry.name}' holds {int(raw.max())}, which is neither true nor false")
        return raw.view(MODEL_TYPES[entry.dtype]).reshape(entry.shape)


def add_payload(sections: Sections, name: str, dtype: str, shape: tuple[int, ...], raw: Bytes) -> TensorEntry:
    """Write a tensor of an ONNX file.

    Args:
        sections: Where to.
        name: What the file calls it.
        dtype: ONNX's name of its type, a key of `ONNX_BITS`.
        shape: Its shape.
        raw: Its bytes in the file, as many as type and shape say.
    """
    codes = _as_codes(raw, dtype, elements_of(shape)) if dtype in SMALL else None
    if codes is not None:
        spec, runs = encode_codes(codes.reshape(shape), zero=_commonest(codes))
        section = sections.add(runs)
        return TensorEntry(name=name, section=section, shape=shape, dtype=dtype, codes=spec, numbers=None)
    numbers, runs = encode_numbers(raw, max(1, ONNX_BITS[dtype] // 8))
    section = sections.add(runs)
    return TensorEntry(name=name, section=section, shape=shape, dtype=dtype, codes=None, numbers=numbers)


def read_payload(container: Container, entry: TensorEntry) -> Bytes:
    """Return the bytes of a tensor of an ONNX file, as they were in it.

    Raises:
        ArtifactError: If the packed file is damaged.
    """
    if entry.codes is None:
        assert entry.numbers is not None  # audited
        return decode_numbers(container.read(entry.section, entry.numbers.streams))
    runs = container.read(entry.section, entry.codes.streams)
    with damage(container.path):
        unsigned = entry.dtype.startswith("U")
        codes = decode_codes(entry.codes, entry.shape, np.uint8 if unsigned else np.int8, runs)
        return _as_raw(codes.reshape(-1), entry.dtype)


def _as_codes(raw: Bytes, dtype: str, elements: int) -> Array | None:
    """Return small integers, int8 or uint8, flat; None where the bytes hold more than them."""
    bits, unsigned = SMALL[dtype], dtype.startswith("U")
    if bits == 8:
        return raw if unsigned else raw.view(np.int8)
    try:
        digits = split_digits(raw, 2**bits, elements)
    except ValueError:  # the last byte is not filled up with zeros
        return None
    if unsigned:
        return digits
    digits ^= np.uint8(2 ** (bits - 1))  # from two's complement of so many bits to that of 8
    digits -= np.uint8(2 ** (bits - 1))
    return digits.view(np.int8)


def _as_raw(codes: Array, dtype: str) -> Bytes:
    """Return small integers as ONNX packs them."""
    bits = SMALL[dtype]
    if bits == 8:
        return codes.view(np.uint8)
    return join_digits(codes.view(np.uint8) & np.uint8(2**bits - 1), 2**bits)


def _commonest(codes: Array) -> int:
    """Return the value that most codes have: what sparse codes leave out, be it 0 or a zero point."""
    if not codes.size:
        return 0
    counts = np.zeros(256, np.int64)
    for start in range(0, codes.size, BLOCK):  # numpy widens what it counts to 8 bytes
        counts += np.bincount(codes[start : start + BLOCK].view(np.uint8), minlength=256)
    byte = int(counts.argmax())
    return byte if codes.dtype == np.uint8 else (byte ^ 128) - 128
