"""The engine's own layer list, as TensorRT prints it at the end of a verbose build (ProfilingVerbosity.DETAILED).

Three dialects, one line a layer:

* TensorRT-RTX: `Constants: [ { Name: …, Dimensions: […], …, Datatype: Int4, … }]`
* TensorRT 10, Myelin layers: constants among the `Inputs`, `…dconst` or `…_constantHalf`, `Format/Datatype: Half`
* TensorRT 10, convolutions: `Weights: {"Type": "Int8", "Count": 294912}` and `HasSparseWeights: 1`
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

# What TensorRT calls a type, in any dialect -> (our name, bits)
TYPES = {
    "Float": ("Float", 32), "FP32": ("Float", 32), "Half": ("Half", 16), "FP16": ("Half", 16),
    "BFloat16": ("BFloat16", 16), "BF16": ("BFloat16", 16), "FP8": ("FP8", 8), "FP4": ("FP4", 4),
    "Int8": ("Int8", 8), "INT8": ("Int8", 8), "Int4": ("Int4", 4), "INT4": ("Int4", 4), "UInt8": ("UInt8", 8),
    "Int32": ("Int32", 32), "INT32": ("Int32", 32), "Int64": ("Int64", 64), "INT64": ("Int64", 64), "Bool": ("Bool", 8),
}  # fmt: skip

_HEAD = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*),")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<shape>[-\d,]*)\]"
    r"(?:, Strides: \[[-\d,]*\])?(?:, StrideOrder: \[[-\d,]*\])?, (?:Format/)?Datatype: (?P<type>[^,}]*?)\s*[,}]"
)
_AFTER_SECTION = "(?=, (?:Constants|Outputs|TacticName|ParameterType|TacticValue|StreamId): )"
_SECTION = {
    key: re.compile(rf", {key}: \[(?P<body>.*?)\]{_AFTER_SECTION}") for key in ("Inputs", "Constants", "Outputs")
}
_WEIGHTS = re.compile(r', Weights: \{"Type": "(?P<type>\w+)", "Count": (?P<count>\d+)\}')
_TACTIC = re.compile(r", TacticName: (?P<tactic>[^,]*)")
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*\[ONNX Layer: |\x1e|\s*$)")
_LIST = re.compile(r"(?:^|\s)Layers:\s*$")
# Old and new wording of the same two lines; where there is a list of layers, it follows a colon.
_FOUND = re.compile(
    r"\(Sparsity\) (?:Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics:?"
    r"|Layers eligible for sparse math:)(?P<names>.*)"
)
_CHOSE = re.compile(
    r"\(Sparsity\) (?:Chose (?P<count>\d+) layer\(s\) using sparse tactics:?"
    r"|TRT inference plan picked sparse implementation for layers:)(?P<names>.*)"
)


@dataclass(frozen=True)
class Constant:
    """Weights inside an engine.

    Args:
        name: As the engine calls them.
        shape: As the engine lays them out; one number, the count, where it does not say.
        dtype: `Float`, `Half`, `Int8`, `Int4`, …
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int | None:
        """How many bytes they take, None for a type that this version does not know."""
        bits = next((bits for name, bits in TYPES.values() if name == self.dtype), None)
        return None if bits is None else (self.elements * bits + 7) // 8


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine.

    Args:
        name: As the engine calls it.
        kind: TensorRT's LayerType.
        constants: The weights it reads.
        inputs: Names of the tensors it reads.
        outputs: Names of the tensors it writes.
        tactic: Its kernel, None where it is chosen at run time.
        onnx: Names of the ONNX nodes that it came from.
        input_types: Types of the tensors it reads, constants left out.
    """

    name: str
    kind: str
    constants: tuple[Constant, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str | None
    onnx: tuple[str, ...]
    input_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sparsity:
    """How many layers could use sparse kernels and how many do; None where the log does not say."""

    eligible: int | None
    chosen: int | None
    chosen_names: frozenset[str]


def parse_layers(log: str) -> tuple[EngineLayer, ...]:
    """Return the layers of the last layer list in a build log, in order; empty where there is no list.

    Args:
        log: The whole log, any logger's prefixes.
    """
    lines = log.splitlines()
    starts = [index for index, line in enumerate(lines) if _LIST.search(line)]
    if not starts:
        return ()
    layers = []
    for line in lines[starts[-1] + 1 :]:
        head = _HEAD.match(line)
        if head is None:
            break  # the list ends at the first line that is no layer
        layers.append(_layer(line, head["name"], head["kind"]))
    return tuple(layers)


def parse_sparsity(log: str) -> Sparsity:
    """Return what the `(Sparsity)` lines of a build log say.

    The lines come once per subgraph as well as for the whole: the largest count is the whole's.
    """
    chosen = list(_CHOSE.finditer(log))
    names = frozenset(name for match in chosen for name in _names(match))
    return Sparsity(_largest(_FOUND.finditer(log)), _largest(chosen), names)


def _layer(line: str, name: str, kind: str) -> EngineLayer:
    inputs, constants, outputs = (_tensors(line, key) for key in ("Inputs", "Constants", "Outputs"))
    # TensorRT 10 lists a Myelin layer's constants as inputs, and only their names tell.
    constants += tuple(tensor for tensor in inputs if "const" in tensor.name and -1 not in tensor.shape)
    if weights := _WEIGHTS.search(line):
        constants += (Constant("Weights", (int(weights["count"]),), _dtype(weights["type"])),)
    tactic = _TACTIC.search(line)
    return EngineLayer(
        name=name,
        kind=kind,
        constants=constants,
        inputs=tuple(tensor.name for tensor in inputs),
        outputs=tuple(tensor.name for tensor in outputs),
        tactic=(tactic["tactic"].strip() or None) if tactic else None,
        input_types=tuple(tensor.dtype for tensor in inputs if "const" not in tensor.name),
        onnx=tuple(_ONNX.findall(line.rpartition(", Metadata: ")[2])),
    )


def _tensors(line: str, section: str) -> tuple[Constant, ...]:
    found = _SECTION[section].search(line)
    if found is None:
        return ()
    return tuple(
        Constant(t["name"], tuple(int(d) for d in t["shape"].split(",") if d), _dtype(t["type"]))
        for t in _TENSOR.finditer(found["body"])
    )


def _dtype(text: str) -> str:
    """Return our name of a type: `Half`, or the FP16 in "Two wide channel vectorized row major FP16 format"."""
    for word in reversed(text.split()):
        if word in TYPES:
            return TYPES[word][0]
    return text


def _names(match: re.Match[str]) -> list[str]:
    return [name.strip() for name in match["names"].split(",") if name.strip()]


def _largest(matches: Iterable[re.Match[str]]) -> int | None:
    return max((int(match["count"]) if match["count"] else len(_names(match)) for match in matches), default=None)
