"""What the bytes of a packed file go to: all of it stands in the header."""

from __future__ import annotations

from dataclasses import dataclass

from slope_compile.pack.dtypes import MODEL_TYPES, ONNX_BITS
from slope_compile.pack.header import CodedEntry, Header, TensorEntry, elements_of
from slope_compile.recipe import parse_pattern

CODED = "codes"


@dataclass(frozen=True)
class TensorSize:
    """One tensor of a packed file.

    Attributes:
        name: In the state dict, or in the ONNX file (may be empty there).
        dtype: `codes` of a coded tensor; else safetensors' or ONNX's name of the element type.
        shape: Of the tensor.
        bits: Of one element: declared for codes, of the type for others.
        pattern: `n:m`, declared along axis 1 or (ONNX) found along the axis that packs best; None where there is none.
        nonzeros: How many codes are not zero (of ONNX: not the commonest value), where the file keeps them apart.
        nominal: Bytes of n/m of the elements at `bits` each, without positions and scales.
        packed: Bytes in this file, scales included; 0 where an earlier tensor has the same bytes, which are kept once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int
    pattern: str | None
    nonzeros: int | None
    nominal: int
    packed: int

    @property
    def elements(self) -> int:
        """How many numbers."""
        return elements_of(self.shape)


@dataclass(frozen=True)
class Sizes:
    """All of a packed file.

    Attributes:
        tensors: A row each, in the file's order.
        weights: Bytes of coded tensors, scales included; of ONNX those of small integers, whose scales are tensors.
        others: Bytes of all other tensors.
        rest: Bytes of the header, and of ONNX what is not tensors.
        model: Bytes of the file: the sum of the three.
    """

    tensors: tuple[TensorSize, ...]
    weights: int
    others: int
    rest: int
    model: int


def sizes_of(header: Header, size: int) -> Sizes:
    """Return what the bytes of a file go to.

    Args:
        header: The file's.
        size: Bytes of the file.
    """
    counted = set[int]()
    rows: list[TensorSize] = []
    weights = others = 0
    entries: list[CodedEntry | TensorEntry] = [*header.coded, *header.tensors]
    for entry in entries:
        packed = 0 if entry.section in counted else header.sections[entry.section].stored
        counted.add(entry.section)
        rows.append(_row(entry, packed, header.content))
        if entry.codes is not None:
            weights += packed
        else:
            others += packed
    return Sizes(tuple(rows), weights, others, size - weights - others, size)


def _row(entry: CodedEntry | TensorEntry, packed: int, content: str) -> TensorSize:
    groups = None if entry.codes is None else entry.codes.groups
    if isinstance(entry, CodedEntry):
        dtype, bits, pattern = CODED, entry.bits, entry.pattern
    else:
        dtype = entry.dtype
        bits = 8 * MODEL_TYPES[dtype].itemsize if content == "model" else ONNX_BITS[dtype]
        pattern = None if groups is None or groups.axis is None else f"{groups.n}:{groups.m}"
    elements = elements_of(entry.shape)
    n, m = (1, 1) if pattern is None else parse_pattern(pattern)
    nonzeros = None if groups is None else groups.nonzeros
    return TensorSize(
        entry.name, dtype, entry.shape, bits, pattern, nonzeros, -(-elements * bits * n // (8 * m)), packed
    )
