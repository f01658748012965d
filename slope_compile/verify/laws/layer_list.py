"""layers.json of the export says of each layer what the files hold: a list that is edited, short or gone is told.

Names, bits and pattern are the checkpoint's; operator, shape, density and bytes are counted on the ONNX file as its
weights go by. Container, placement and bytes may also be those that the export gives such codes: a tool that writes the
file anew may store them in another way. Where only digests of the codes are known, what the export gives them is not,
and the three are not judged. Reasons are not checked: no file tells them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slope_compile.codes_file import StoredCodes
from slope_compile.committed import ExportList, LayerRow, read_committed
from slope_compile.compression.codes import CodedTensor
from slope_compile.errors import ArtifactError
from slope_compile.export.placement import place
from slope_compile.qdq.checks import Finding
from slope_compile.qdq.matrices import GEMM
from slope_compile.qdq.pattern import is_sparse
from slope_compile.qdq.sites import Quantizer, Sites, hex_step, site_problems
from slope_compile.qdq.tensors import INTEGER_BITS, element_bits, load_graph
from slope_compile.qdq.weights import CodedWeight
from slope_compile.verify.built.rows import reads_integers
from slope_compile.verify.chain.golden import KeptWeight

if TYPE_CHECKING:
    from torch import nn

_DENSITY = 1e-12  # counted alike, divided alike: what is left is how JSON writes a float


@dataclass(frozen=True)
class _Counted:
    """One weight of the file; its numbers are gone.

    Args:
        op: What multiplies with it.
        dtype: Of what is stored.
        shapes: As stored, and as trained.
        scale_bytes: Of its scales.
        nonzeros: How many numbers are not 0.
        blocks: Whether a part of the input channels shares a stored scale.
        sparse: Whether codes in INT8 fit 2:4.
    """

    op: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    scale_bytes: int
    nonzeros: int
    blocks: bool
    sparse: bool

    @classmethod
    def of(cls, weight: CodedWeight) -> _Counted:
        """Count a weight."""
        return cls(
            op=weight.op,
            dtype=weight.dtype,
            shapes=(tuple(weight.stored.shape), tuple(weight.as_trained().stored.shape)),
            scale_bytes=0 if weight.scale is None else weight.scale.nbytes,
            nonzeros=int(np.count_nonzero(weight.stored)),
            blocks=bool(weight.block_size),
            sparse=weight.dtype == "INT8" and is_sparse(weight),
        )


class LayerList:
    """An export's layer list, held against the files.

    Args:
        path: layers.json, or m.layers.json beside m.onnx.
        onnx: The exported file.
    """

    def __init__(self, path: Path, onnx: Path) -> None:
        self._path, self._onnx = path, onnx
        self._counted: dict[str, _Counted] = {}

    @property
    def name(self) -> str:
        """The file's name."""
        return self._path.name

    def watched(self, weights: Iterable[CodedWeight]) -> Iterator[CodedWeight]:
        """Hand on the file's weights, each counted; none is held."""
        for weight in weights:
            if weight.name not in self._counted:
                self._counted[weight.name] = _Counted.of(weight)
            held = [weight]
            del weight
            yield held.pop()  # so that nothing here holds it

    def findings(
        self,
        codes: Mapping[str, CodedTensor] | None,
        model: nn.Module | None,
        kept: Mapping[str, KeptWeight] | None = None,
    ) -> list[Finding]:
        """Return what the list says that is not so, after the weights went by.

        Args:
            codes: The checkpoint's coded tensors; None where there are none to compare with.
            model: The trained model, which says of layers in float that they should be listed.
            kept: What golden samples say of weights, where there are no codes.
        """
        try:
            listed = read_committed(self._path, ExportList, "Export the model again.")
        except ArtifactError as error:
            return [Finding(self._path.name, "file", error.problem)]
        rows = {row.name: row for row in listed.layers}
        times = Counter(row.name for row in listed.layers)
        found = [(name, f"has {count} rows") for name, count in times.items() if count > 1]
        wanted = self._layers(codes, model)
        found += [(name, "has no row") for name in sorted(wanted - rows.keys())]
        if model is not None:
            found += [(name, "a row for no layer of the trained model") for name in rows if name not in wanted]
        rules = _Rules(self._onnx)
        for name, row in rows.items():
            known = _trained(codes, kept or {}, name)
            judged = codes is not None or name not in (kept or {})
            found += [(name, told) for told in self._row_problems(row, known, codes, rules, judged)]
        found += self._quantizer_problems(listed)
        return [Finding(name, self._path.name, told) for name, told in found]

    def _layers(self, codes: Mapping[str, CodedTensor] | None, model: nn.Module | None) -> set[str]:
        """Return the weights that the list must have a row for, as far as that can be known."""
        known = {name for name, one in self._counted.items() if one.dtype in INTEGER_BITS}
        known |= set(codes or ())
        if model is not None:
            from slope_compile.export.layers import layer_weights

            known |= layer_weights(model).keys()
        return known

    def _row_problems(
        self,
        row: LayerRow,
        trained: _Trained | None,
        codes: Mapping[str, CodedTensor] | None,
        rules: _Rules,
        judged: bool,
    ) -> Iterator[str]:
        """Yield what is not so; how the weight is stored is `judged` where codes or nothing at all is known of it."""
        elements, stored = math.prod(row.shape), self._counted.get(row.name)
        if row.bytes.fp32 != 4 * elements:
            yield f"bytes.fp32 is {row.bytes.fp32}; {row.shape} takes {4 * elements}"
        if trained is not None:
            for key, said, known in zip(("bits", "pattern"), (row.bits, row.pattern), trained, strict=False):
                if said != known:
                    yield f"{key} is {said}, trained {known}"
        shapes = stored.shapes if stored is not None else ()
        shapes = (trained.shape,) if trained is not None and trained.shape is not None else shapes
        if shapes and tuple(row.shape) not in shapes:
            yield f"shape is {row.shape}, {'stored' if shapes[1:] else 'trained'} {list(shapes[0])}"
        if stored is not None:
            yield from self._counted_problems(row, stored)
            told, here = _Place(row.container, row.placement, row.bytes.file), rules.found(row.name, stored)
            if judged and told != here and told != rules.made(row.name, codes or {}, stored.op):
                yield f"{told}; the file holds {here}"

    def _counted_problems(self, row: LayerRow, stored: _Counted) -> Iterator[str]:
        density = stored.nonzeros / max(math.prod(stored.shapes[0]), 1)
        if not abs(row.density - density) <= _DENSITY:
            yield f"density is {row.density}, counted {density}"
        if row.op != stored.op and not {row.op, stored.op} <= set(GEMM):  # a MatMul may become a Gemm
            yield f"op is {row.op}, the file multiplies in a {stored.op}"

    def _quantizer_problems(self, listed: ExportList) -> Iterator[tuple[str, str]]:
        said: dict[str, Quantizer] = {}
        name = ""
        try:
            for row in listed.activations:
                name = row.name
                if row.pairs:
                    said[name] = Quantizer(hex_step(row.scale), row.bits, row.low, row.high, row.pairs)
        except (ValueError, OverflowError) as error:
            yield name, f"activations: {error}"
            return
        for told in site_problems(Sites(said), self._onnx):
            name, _, problem = told.partition(": ")
            yield name, f"activations: {problem}"


class _Place(NamedTuple):
    """How a weight is stored."""

    container: str
    placement: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.placement} in {self.container}, {self.bytes} bytes"


class _Rules:
    """What a file shows of a weight, and what the export makes of its codes there."""

    def __init__(self, onnx: Path) -> None:
        model = load_graph(onnx)
        self._opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=0)
        self._integers = reads_integers(model)

    def found(self, name: str, stored: _Counted) -> _Place:
        """Return how the file stores it."""
        if stored.dtype in ("INT2", "INT4"):
            placement = "int4-weight" if stored.blocks else "int4-storage"
        elif stored.dtype not in INTEGER_BITS:
            placement = "float"
        elif not self._integers.get((name, stored.op), False):
            placement = "int8-weight"
        else:
            placement = "sparse-int8" if stored.sparse else "int8"
        held = _packed_bytes(math.prod(stored.shapes[0]), stored.dtype) + stored.scale_bytes
        return _Place(stored.dtype, placement, held)

    def made(self, name: str, codes: Mapping[str, CodedTensor], op: str) -> _Place | None:
        """Return how the export stores it; None where there are no such codes."""
        try:
            coded = codes[name]
        except (KeyError, ArtifactError):  # they break a law: that was told
            return None
        placement = place(coded, op, self._opset, self._integers.get((name, op), False))
        shape = tuple(coded.codes.shape)
        scales = math.prod(shape[:2]) // placement.block_size if placement.block_size else np.asarray(coded.scale).size
        held = _packed_bytes(math.prod(shape), placement.container) + 4 * scales
        return _Place(placement.container, placement.name, held)


def _packed_bytes(size: int, dtype: str) -> int:
    return -(-size * element_bits(dtype) // 8)


class _Trained(NamedTuple):
    """What the checkpoint's codes say of a weight: nothing of one in float."""

    bits: int | None = None
    pattern: str | None = None
    shape: tuple[int, ...] | None = None


def _trained(codes: Mapping[str, CodedTensor] | None, kept: Mapping[str, KeptWeight], name: str) -> _Trained | None:
    """Return what is declared of a weight, of a file from its header alone; None where nothing is."""
    if codes is None:
        return _Trained(kept[name].bits, _text(kept[name].pattern)) if name in kept else None
    if name not in codes:
        return _Trained()
    if isinstance(codes, StoredCodes):
        bits, pattern, shape = codes.bits(name), codes.pattern(name), codes.shape(name)
    else:
        bits, pattern, shape = codes[name].bits, codes[name].pattern, tuple(codes[name].codes.shape)
    return _Trained(bits, _text(pattern), shape)


def _text(pattern: tuple[int, int] | None) -> str | None:
    return None if pattern is None else "{}:{}".format(*pattern)
