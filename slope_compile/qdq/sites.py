"""Where the quantizers of activations of an ONNX file sit: told by what is multiplied or quantized right before.

A quantizer is known by its name, a layer by its weight's. What lies between them (norms, additions, activations, moved
values) may be written in many ways, and only passes on where a value comes from:

    x -> Conv a -> BatchNorm -> Relu -> quantizer c.input -> Conv c -> Add (and the Relu's value) -> the output

    reads: a.weight: the input;  c.input: a.weight;  c.weight: c.input;  the output: a.weight, c.weight

So a layer that reads a tensor before it is quantized, and a quantizer that was moved, read something else.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Protocol

import onnx
from onnx import NodeProto, TensorProto

from slope_compile.errors import ArtifactError
from slope_compile.qdq.activations import StoredQuantizer, stored_quantizers
from slope_compile.qdq.graph import Scope, is_standard, read_by, scopes
from slope_compile.qdq.reader import trace_constant, weight_inputs
from slope_compile.qdq.tensors import REMEDY, load_graph

OUTSIDE = ""  # as what reads: the model's outputs; as what is read: its inputs
MOST = 20_000_000  # names in all that are passed on: a hostile graph can make them many
INT8_MAX = 127
Reads = Mapping[str, tuple[str, ...]]  # layer or quantizer -> the layers and quantizers right before it


class Levels(Protocol):
    """A quantizer, trained or stored."""

    @property
    def scale(self) -> float:
        """The step."""

    @property
    def low(self) -> int:
        """The lowest level."""

    @property
    def high(self) -> int:
        """The highest."""


class Trained(Levels, Protocol):
    """A trained quantizer."""

    @property
    def bits(self) -> int:
        """2 to 8."""


@dataclass(frozen=True)
class Quantizer:
    """One quantizer of activations.

    Args:
        step: The bits of its float32 step, in hexadecimal.
        bits: 2 to 8.
        low: The lowest level: 0 where it is unsigned.
        high: The highest.
        pairs: How many tensors it quantizes in the file.
    """

    step: str
    bits: int
    low: int
    high: int
    pairs: int

    def __post_init__(self) -> None:
        numbers = (self.bits, self.low, self.high, self.pairs)
        if not isinstance(self.step, str) or len(bytes.fromhex(self.step)) != 4:
            raise ValueError(f"the step {self.step!r} is no float32")
        if not all(type(number) is int for number in numbers):
            raise ValueError(f"{numbers} are no integers")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an activation of {self.bits} bits")
        half = 2 ** (self.bits - 1)
        if (self.low, self.high) not in ((-half, half - 1), (0, min(2 * half - 1, INT8_MAX))):
            raise ValueError(f"{self.bits} bits have no levels {self.low} to {self.high}")
        if self.pairs < 1:
            raise ValueError(f"{self.pairs} tensors are quantized")


@dataclass(frozen=True)
class Sites:
    """All quantizers of a file, and what each layer and each of them reads.

    Args:
        quantizers: By name.
        reads: Empty where nothing is quantized.
    """

    quantizers: Mapping[str, Quantizer] = field(default_factory=dict)
    reads: Reads = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            "quantizers": {name: asdict(one) for name, one in sorted(self.quantizers.items())},
            "reads": {name: list(read) for name, read in sorted(self.reads.items())},
        }

    @classmethod
    def from_json(cls, raw: Any) -> Sites:
        """Read it back; raises KeyError, TypeError, ValueError or AttributeError if it is anything else."""
        if raw.keys() != {"quantizers", "reads"}:
            raise ValueError(f"quantizers are told by {sorted(raw)}")
        reads = {str(name): tuple(map(str, read)) for name, read in raw["reads"].items()}
        return cls({str(name): Quantizer(**one) for name, one in raw["quantizers"].items()}, reads)


def sites_of(path: Path, trained: Mapping[str, Trained]) -> Sites:
    """Return the quantizers of an exported file, their numbers as they were trained.

    Args:
        path: The file, proved to hold them.
        trained: Name -> quantizer; those that the file does not use are left out.

    Raises:
        ArtifactError: If the file cannot be read.
    """
    pairs = _pairs(path)
    if not pairs:
        return Sites()
    found = {
        name: Quantizer(hex_step(one.scale), one.bits, one.low, one.high, pairs[name])
        for name, one in trained.items()
        if name in pairs
    }
    return Sites(found, what_is_read(load_graph(path)))


def site_problems(expected: Sites, path: Path) -> Iterator[str]:
    """Yield how the quantizers of a file differ from those that were exported, each named.

    Args:
        expected: As they were exported.
        path: The file.

    Raises:
        ArtifactError: If the file cannot be read.
    """
    stored: dict[str, list[StoredQuantizer]] = {}
    for found in stored_quantizers(path):
        stored.setdefault(found.name, []).append(found)
    lost = [name for name in expected.quantizers if name not in stored]
    more = [name for name in stored if name not in expected.quantizers]
    if not expected.quantizers and not more:
        return
    for name in lost:
        readers = [reader or "the output" for reader, read in expected.reads.items() if name in read]
        told = f"{expected.quantizers[name].bits} bits" + (f", read by {', '.join(readers[:3])}" if readers else "")
        yield f"{name}: {told}: {path.name} does not quantize there"
    for name in more:
        yield f"{name}: {path.name} quantizes there, the model that was exported does not"
    for name, one in expected.quantizers.items():
        yield from (f"{name}: {told}" for told in _differences(one, stored.get(name, [])))
    if expected.reads and stored:
        yield from _misread(expected.reads, what_is_read(load_graph(path)), set(lost), set(more))


def what_is_read(model: onnx.ModelProto) -> Reads:
    """Return what each layer and each quantizer of the main graph reads, by names, sorted.

    Args:
        model: As `load_graph` returns it, external data beside it or not: no numbers are read.

    Raises:
        ArtifactError: If the graph is no graph, or passes on too much.
    """
    scope = next(iter(scopes(model)))
    found: dict[str, set[str]] = {}
    behind: dict[str, frozenset[str]] = {value.name: frozenset([OUTSIDE]) for value in model.graph.input}
    behind |= {tensor.name: frozenset() for tensor in model.graph.initializer}
    passed = 0
    for node in _in_order(scope):
        name, inputs = _named(scope, node)
        comes = frozenset[str]().union(*(behind.get(value, frozenset()) for value in inputs))
        if name is not None:
            found.setdefault(name, set()).update(comes - {name})  # what is on a quantizer's grid already stays there
            comes = frozenset([name])
        passed += len(comes)
        if passed > MOST:
            raise ArtifactError(f"The ONNX graph has too many ways between its layers: over {MOST}.", REMEDY)
        behind |= dict.fromkeys(filter(None, node.output), comes)
    ends = frozenset[str]().union(*(behind.get(value.name, frozenset()) for value in model.graph.output))
    found[OUTSIDE] = set(ends)
    return {name: tuple(sorted(read)) for name, read in found.items()}


def _named(scope: Scope, node: NodeProto) -> tuple[str | None, list[str]]:
    """Return what a node is known by, if it is a layer or a quantizer, and the values that it computes from."""
    for index in weight_inputs(node):
        _, name, tensor = trace_constant(scope, node.input[index])
        if tensor is not None:
            others = [value for place, value in enumerate(node.input) if place != index and value]
            return (name or node.name).removesuffix(".codes"), others
    if is_standard(node, "QuantizeLinear") and len(node.input) > 1:
        _, scale, source = scope.find(node.input[1])
        constant = trace_constant(scope, node.input[0])[2] is not None
        if isinstance(source, TensorProto) and not constant:
            return scale.removesuffix(".scale"), [node.input[0]]
    return None, read_by(node)


def _in_order(scope: Scope) -> list[NodeProto]:
    """Return the nodes, each behind what it reads: a file's own order is only its word."""
    made_by = {value: index for index, node in enumerate(scope.nodes) for value in node.output if value}
    before = {index: {made_by[v] for v in read_by(node) if v in made_by} for index, node in enumerate(scope.nodes)}
    try:
        return [scope.nodes[index] for index in TopologicalSorter(before).static_order()]
    except CycleError:
        raise ArtifactError("A value of the ONNX graph depends on itself.", REMEDY) from None


def _differences(expected: Quantizer, stored: Sequence[StoredQuantizer]) -> Iterator[str]:
    if not stored:
        return
    steps = {hex_step(one.scale) for one in stored}
    if steps != {expected.step}:
        found = ", ".join(repr(one.scale) for one in stored[:2])
        yield f"step is {found}, exported as {struct.unpack('>f', bytes.fromhex(expected.step))[0]!r}"
    first = [one for one in stored if not one.again] or stored
    for one in first:  # a higher low end is a Relu of the model's own: nothing below it is left to clip
        if one.zero_point or one.high != expected.high or one.low < expected.low:
            levels = f"{expected.low} to {expected.high}"
            yield f"levels {one.low} to {one.high} around {one.zero_point}, exported with {levels}"
            break
    if not len(first) <= expected.pairs <= len(stored):  # an export may have such pairs too
        yield f"quantizes {len(first)} tensors, {expected.pairs} when it was exported"


def _misread(expected: Reads, found: Reads, lost: set[str], more: set[str]) -> Iterator[str]:
    """Yield who reads something else than at export, where that is not told by a quantizer that is gone or new."""
    for name, wanted in expected.items():
        if name not in found:  # a weight that is gone is for `codes` to say; a quantizer was told
            continue
        before, now = _through(wanted, expected, lost), _through(found[name], found, more)
        if before != now:
            here, exported = _told(now - before, now), _told(before - now, before)
            yield f"{name or 'the output'} reads {here}, not {exported} as when it was exported"


def _through(names: tuple[str, ...], reads: Reads, gone: set[str]) -> set[str]:
    """Return what is read once those that are gone only pass on what they read."""
    left, seen, waiting = set[str](), set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name not in gone:
            left.add(name)
        elif name not in seen:
            seen.add(name)
            waiting += reads.get(name, ())
    return left


def _told(names: set[str], all_of_them: set[str]) -> str:
    shown = sorted(names or all_of_them)
    return ", ".join(name or "the input" for name in shown[:3]) or "nothing"


def _pairs(path: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for one in stored_quantizers(path):
        found[one.name] = found.get(one.name, 0) + 1
    return found


def hex_step(step: float) -> str:
    """Return the bits of a step as a float32, in hexadecimal; raises OverflowError where it is none."""
    return struct.pack(">f", step).hex()
