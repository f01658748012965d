"""The engine's own layer list, as TensorRT prints it at the end of a verbose build (ProfilingVerbosity.DETAILED).

Three dialects, one line a layer:

* TensorRT-RTX: `Constants: [ { Name: …, Dimensions: […], …, Datatype: Int4, … }]`
* TensorRT 10, Myelin layers: constants among the `Inputs`, `…dconst` or `…_constantHalf`, `Format/Datatype: Half`
* TensorRT 10, convolutions: `Weights: {"Type": "Int8", "Count": 294912}` and `HasSparseWeights: 1`

`inspector.py` reads the same things from the engine inspector's JSON, where a GPU makes that possible.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
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
_SPARSE_WEIGHTS = re.compile(r", HasSparseWeights: (?P<flag>[01])")
# Between the names of a layer's nodes: nothing, a record separator (TensorRT 8.6, 10) or a unit separator (11).
_ONNX = re.compile(r"\[ONNX Layer: (.*?)\](?=\s*\[ONNX Layer: |[\x1e\x1f]|\s*$)")
# Myelin's names for what it was given or folded: `…_dconst`, `…_const`, `NAME_constantHalf`
_CONSTANT = re.compile(r"(?:_|d)const(?:$|[_-])|_constant(?:Float|Half|BFloat16|U?Int\d|FP\d|Bool)")
_MYELIN_SUFFIX = re.compile(r"_myl\d+_\d+$")
COUNTED = "Weights"  # the name of a constant of which an engine tells no more than type and count
# What an engine that was built ahead of time names in place of a kernel that is chosen at run time.
STUB = "__myelin_CASK_STUB"
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
        sparse_weights: What `HasSparseWeights` says: the weights are 2:4, whatever the kernel; None where it is not
            said.
    """

    name: str
    kind: str
    constants: tuple[Constant, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str | None
    onnx: tuple[str, ...]
    input_types: tuple[str, ...] = ()
    sparse_weights: bool | None = None


@dataclass(frozen=True)
class Sparsity:
    """How many layers could use sparse kernels and how many do; None where the log does not say.

    Args:
        eligible: The largest count of eligible layers.
        chosen: The largest count of layers with a sparse kernel.
        chosen_names: Their names, where the log lists any.
        eligible_names: Likewise.
    """

    eligible: int | None
    chosen: int | None
    chosen_names: frozenset[str] = frozenset()
    eligible_names: frozenset[str] = frozenset()


def parse_layers(log: str) -> tuple[EngineLayer, ...]:
    """Return the layers of the last layer list in a build log, in order; empty where there is no list.

    Args:
        log: The whole log, any logger's prefixes.
    """
    lines = [line.rstrip("\r") for line in log.split("\n")]  # splitlines would split at U+001E too
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
    found, chosen = list(_FOUND.finditer(log)), list(_CHOSE.finditer(log))
    names = [frozenset(name for match in matches for name in _names(match)) for matches in (chosen, found)]
    return Sparsity(_largest(found), _largest(chosen), *names)


def engine_layer(
    name: str,
    kind: str,
    tensors: Mapping[str, tuple[Constant, ...]],
    weights: Constant | None,
    tactic: str | None,
    metadata: str | None,
    sparse_weights: bool | None,
) -> EngineLayer:
    """Return a layer from what either dialect says of it.

    Args:
        name: As the engine calls it.
        kind: TensorRT's LayerType.
        tensors: What its `Inputs`, `Constants` and `Outputs` list.
        weights: What `Weights` says, if anything.
        tactic: The kernel, as printed.
        metadata: Names the ONNX nodes; None before TensorRT 8.6, where the layer's name consists of theirs.
        sparse_weights: What `HasSparseWeights` says.
    """
    inputs, constants, outputs = (tensors.get(key, ()) for key in ("Inputs", "Constants", "Outputs"))
    # TensorRT 10 lists a Myelin layer's constants as inputs, and only their names tell.
    constants += tuple(tensor for tensor in inputs if _is_constant(tensor))
    if weights is not None:
        constants += (weights,)
    elif kind == "Constant":
        constants += outputs
    return EngineLayer(
        name=name,
        kind=kind,
        constants=constants,
        inputs=tuple(tensor.name for tensor in inputs),
        outputs=tuple(tensor.name for tensor in outputs),
        tactic=tactic if tactic and tactic != STUB else None,
        onnx=_nodes(name, kind, metadata),
        input_types=tuple(tensor.dtype for tensor in inputs if not _is_constant(tensor)),
        sparse_weights=sparse_weights,
    )


def _nodes(name: str, kind: str, metadata: str | None) -> tuple[str, ...]:
    if metadata is not None:
        return tuple(_ONNX.findall(metadata))
    return () if kind == "Reformat" else split_name(name)  # a reformat is named after the layer it serves


def split_name(name: str) -> tuple[str, ...]:
    """Return the names that an engine layer's name is made of: `a + b` (fused), `a || b` (merged), `a_myl0_3`."""
    return tuple(part for part in re.split(r" \+ | \|\| ", _MYELIN_SUFFIX.sub("", name)) if part)


def type_name(text: str) -> str:
    """Return our name of a type: `Half`, or the FP16 in "Two wide channel vectorized row major FP16 format"."""
    for word in reversed(text.split()):
        if word in TYPES:
            return TYPES[word][0]
    return text


def _layer(line: str, name: str, kind: str) -> EngineLayer:
    weights, tactic, sparse = _WEIGHTS.search(line), _TACTIC.search(line), _SPARSE_WEIGHTS.search(line)
    return engine_layer(
        name=name,
        kind=kind,
        tensors={key: _tensors(line, key) for key in _SECTION},
        weights=Constant(COUNTED, (int(weights["count"]),), type_name(weights["type"])) if weights else None,
        tactic=tactic["tactic"].strip() if tactic else None,
        metadata=line.rpartition(", Metadata: ")[2] if ", Metadata: " in line else None,
        sparse_weights=sparse["flag"] == "1" if sparse else None,
    )


def _is_constant(tensor: Constant) -> bool:
    return bool(_CONSTANT.search(tensor.name)) and -1 not in tensor.shape


def _tensors(line: str, section: str) -> tuple[Constant, ...]:
    found = _SECTION[section].search(line)
    if found is None:
        return ()
    return tuple(
        Constant(t["name"], tuple(int(d) for d in t["shape"].split(",") if d), type_name(t["type"]))
        for t in _TENSOR.finditer(found["body"])
    )


def _names(match: re.Match[str]) -> list[str]:
    return [name.strip() for name in match["names"].split(",") if name.strip()]


def _largest(matches: Iterable[re.Match[str]]) -> int | None:
    return max((int(match["count"]) if match["count"] else len(_names(match)) for match in matches), default=None)
