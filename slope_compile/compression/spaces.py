"""A space: channels that keep one order, and every tensor that follows it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """A stretch of a tensor's axis in the order of a space.

    Attributes:
        tensor: A parameter or buffer.
        axis: The axis; for a layer that reads the space it is 1.
        offset: Where the stretch begins.
        repeat: Places that each channel takes, side by side.
        groups: Of a grouped convolution that reads the space: its axis 1 has a group's channels only.
    """

    tensor: Tensor
    axis: int
    offset: int = 0
    repeat: int = 1
    groups: int = 1


@dataclass(eq=False)
class Space:
    """Channels in one order.

    Attributes:
        size: How many.
        blocks: Channels stay within their block of size / blocks.
        frozen: Why they may not move; None: they may.
        slices: Every tensor that follows the order.
        readers: (layer name, its slice) of layers that sum over the channels.
    """

    size: int
    blocks: int = 1
    frozen: str | None = None
    slices: list[Slice] = field(default_factory=list)
    readers: list[tuple[str, Slice]] = field(default_factory=list)
    merged: Space | None = None

    def root(self) -> Space:
        """Return the space that this one was merged into, or itself."""
        return self if self.merged is None else self.merged.root()

    def freeze(self, reason: str) -> None:
        """Forbid any other order; the first reason stays."""
        root = self.root()
        root.frozen = root.frozen or reason

    def divide(self, blocks: int) -> None:
        """Keep the channels within blocks, beside the blocks that there are."""
        root = self.root()
        fine, coarse = max(blocks, root.blocks), min(blocks, root.blocks)
        if fine % coarse:
            root.freeze(f"groups of {blocks} and of {root.blocks} share it")
        root.blocks = fine

    def merge(self, other: Space) -> None:
        """Make two spaces of one size one."""
        a, b = self.root(), other.root()
        if a is b:
            return
        b.merged = a
        a.slices += b.slices
        a.readers += b.readers
        a.divide(b.blocks)
        if b.frozen:
            a.freeze(b.frozen)


@dataclass(frozen=True)
class Channels:
    """What is known of a tensor: its channels run along an axis, a stretch of each space after the other.

    Attributes:
        parts: (space, places a channel takes).
        axis: 1, or -1 for the last of an unknown number of axes.
        rank: Number of axes, if known.
        flat: Height and width were merged into the channel axis: every channel takes the same unknown number of places.
    """

    parts: tuple[tuple[Space, int], ...]
    axis: int
    rank: int | None
    flat: bool = False

    @property
    def width(self) -> int:
        """Length of the channel axis, before flattening."""
        return sum(space.size * repeat for space, repeat in self.parts)
