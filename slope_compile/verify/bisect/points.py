"""What two implementations of one network are compared at: tensors that both of them have, under one key.

A layer keeps its trained name in the ONNX file, so its input and output are tensors of both. So are what a quantizer of
activations reads and makes. Two ONNX files share every value of the same name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from slope_compile.qdq.sites import Levels
from slope_compile.verify.chain.runners import Array, Arrays

Role = Literal["input", "output", "product", "quantizer", "read", "value", "result"]
_CALLED: tuple[Role, ...] = ("input", "output", "product", "quantizer")  # roles of which each call has its own
# What a tensor that has several keys is called, best first.
_PREFERENCE: tuple[Role, ...] = ("quantizer", "output", "product", "result", "value", "input", "read")


class Key(NamedTuple):
    """A tensor of a network.

    Args:
        name: The layer (`layer1.0.conv1`), the quantizer (`layer1.0.conv1.input`), the ONNX value, or the number of the
            model's output.
        role: A layer's `input`, its `output` with the bias, or its `product` without one; a quantizer's integers
            (`quantizer`) or what it `read`; an ONNX `value`; one of the model's outputs (`result`).
        call: Which call of a layer or quantizer that is called several times.
    """

    name: str
    role: Role
    call: int = 0

    def __str__(self) -> str:
        what = {"input": f"the input of {self.name}", "result": "the outputs"}.get(self.role, self.name)
        return f"{what} (call {self.call + 1})" if self.call else what


class Side(Protocol):
    """One implementation of the network: torch, or an ONNX file in ONNX Runtime."""

    @property
    def free_batch(self) -> bool:
        """Whether it takes a batch of any size."""

    def keys(self, feed: Arrays) -> Mapping[Key, int | None]:
        """Return its tensors in the order in which they are computed, with their bytes where known."""

    def values(self, feed: Arrays, keys: Iterable[Key]) -> dict[Key, Array]:
        """Run it and return some of its tensors: floats as float32, integers of quantizers as they are."""

    def length(self, layer: str) -> int:
        """Return K, the products in one output of a layer; 0 for what is no layer."""

    def operator(self, layer: str) -> str:
        """Return what a layer is called on this side: Conv, Linear, ..."""

    def levels(self) -> Mapping[str, Levels]:
        """Return its quantizers of activations by name."""

    def results(self, feed: Arrays) -> list[Array]:
        """Run it as it is, with nothing marked, and return its outputs."""


def matched(reference: Mapping[Key, int | None], tested: Mapping[Key, int | None]) -> list[Key]:
    """Return the keys that both sides have, in the tested side's order.

    A layer that is not called as often on one side as on the other is left out: nobody knows which call is which.

    Args:
        reference: Its keys.
        tested: Its keys.
    """
    calls = [Counter((key.name, key.role) for key in side if key.role in _CALLED) for side in (reference, tested)]
    return [
        key
        for key in tested
        if key in reference
        and (key.role not in _CALLED or calls[0][key.name, key.role] == calls[1][key.name, key.role])
    ]


def best_named(keys: Iterable[Key]) -> Key:
    """Return the key that says most, of those that one tensor has."""
    return min(keys, key=lambda key: _PREFERENCE.index(key.role))


def groups(sizes: Sequence[int | None], budget: int) -> list[range]:
    """Cut a sequence of tensors into runs of neighbours that fit a number of bytes together, each at least one long.

    Args:
        sizes: Bytes of each; None where unknown, which counts as a quarter of the budget.
        budget: Bytes.
    """
    found, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        size = budget // 4 if size is None else size
        if index > start and held + size > budget:
            found.append(range(start, index))
            start, held = index, 0
        held += size
    return [*found, range(start, len(sizes))] if sizes else []
