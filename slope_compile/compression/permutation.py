"""Channel permutation: reorder input channels so that an n:m pattern keeps more magnitude, and change no output.

Method: Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021. Which channels sit in one group of m is an
accident of their order. The order of a layer's inputs may change if whatever puts them out changes alike: the filters
and biases of the layers before, the norms between, every layer that reads them or adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slope_compile.compression.channels import NotTraceableError, read_spaces
from slope_compile.compression.regrouping import best_order
from slope_compile.compression.spaces import Slice, Space
from slope_compile.compression.sparsity import keep_largest

Pattern = tuple[int, int]
_FINE = 2.0**40  # magnitudes as integers of this resolution: their sums are exact in int64, in any order


@dataclass(frozen=True)
class Permutation:
    """What was permuted, and what not.

    Attributes:
        kept: Layer -> (share of its magnitude that the pattern kept before, and keeps now).
        left: Layer with a pattern -> why its input channels stay in their order.
    """

    kept: dict[str, tuple[float, float]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line: how many layers, and what it brought on their average."""
        if not self.kept:
            why = "; ".join(list(dict.fromkeys(self.left.values()))[:2]) or "no layer has a pattern"
            return f"input channels of no layer permuted: {why}"
        before, after = (sum(pair[side] for pair in self.kept.values()) / len(self.kept) for side in (0, 1))
        done = f"input channels of {len(self.kept)} of {len(self.kept) + len(self.left)} layers permuted"
        return f"{done}: their patterns keep {after:.2%} of the magnitude, {before:.2%} before"


@torch.no_grad()
def permute_channels(model: nn.Module, patterns: Mapping[str, Pattern]) -> Permutation:
    """Reorder channels in place: outputs, shapes and names stay, and the magnitude kept in all does not fall.

    The result is a function of the weights: equal weights are permuted alike in every process.

    Args:
        model: Convolution and linear layers with weights of their own, finite.
        patterns: Layer name -> (n, m) that is to be put on its weight.
    """
    if not patterns:
        return Permutation()
    try:
        spaces, unfed = read_spaces(model)
    except NotTraceableError as error:
        return Permutation(left=dict.fromkeys(patterns, str(error)))
    weights = {name: model.get_parameter(f"{name}.weight" if name else "weight").detach() for name in patterns}
    before = {name: _share_kept(weights[name], patterns[name]) for name in patterns}
    moved: set[str] = set()
    left = dict.fromkeys(patterns, "it is part of a module that is not followed") | unfed
    for space in spaces:
        readers = [(name, piece) for name, piece in space.readers if name in patterns]
        reason = _permute_space(space, readers, patterns) if readers else None
        for name, _ in readers:
            if reason is None:
                moved.add(name)
            else:
                left[name] = reason
    kept = {name: (before[name], _share_kept(weights[name], patterns[name])) for name in patterns if name in moved}
    return Permutation(kept, {name: left[name] for name in patterns if name not in moved})


def _permute_space(space: Space, readers: list[tuple[str, Slice]], patterns: Mapping[str, Pattern]) -> str | None:
    """Search an order for a space and apply it; say why not, where it keeps its own."""
    if space.frozen:
        return space.frozen
    n, m = _most_weighted(readers, patterns)
    width = space.size // space.blocks
    if width % m or width == m:
        within = "" if space.blocks == 1 else f" in each of {space.blocks} blocks that keep theirs"
        return f"{width} channels{within} leave no other groups of {m} to form"
    # Only where groups lie wholly inside the stretch can the search count them; what else reads it is weighed after.
    counted = [
        piece for name, piece in readers if patterns[name] == (n, m) and piece.repeat == 1 and piece.offset % m == 0
    ]
    if not counted:
        return f"no group of {m} lies within its channels"
    matrix = torch.cat([_channel_rows(piece, space) for piece in counted], dim=2)
    order = best_order(matrix, n, m)
    if torch.equal(order, torch.arange(width, device=order.device).expand_as(order)):
        return "no order was found that keeps more"
    start = torch.arange(0, space.size, width, device=order.device)[:, None]
    source = (order + start).flatten()  # [size]
    was = _kept(readers, patterns)
    _apply(space, source)
    if _kept(readers, patterns) < was:
        _apply(space, source.argsort())
        return "no order was found that keeps more in all layers that share it"
    return None


def _most_weighted(readers: list[tuple[str, Slice]], patterns: Mapping[str, Pattern]) -> Pattern:
    """Return the pattern that most weights of the readers get."""
    weights: dict[Pattern, int] = {}
    for name, piece in readers:
        weights[patterns[name]] = weights.get(patterns[name], 0) + piece.tensor.numel()
    return max(weights, key=lambda pattern: weights[pattern])


def _channel_rows(piece: Slice, space: Space) -> Tensor:
    """Return |W| of a reader with the space's channels in front: float [blocks, channels of a block, rows]."""
    weight = piece.tensor.detach()
    groups, blocks = piece.groups, space.blocks
    stretch = weight if groups > 1 else weight.narrow(1, piece.offset, space.size)  # [k, c, ...]
    grouped = stretch.reshape(groups, stretch.shape[0] // groups, stretch.shape[1], -1)  # [g, k/g, c, r*s]
    rows = grouped.permute(0, 2, 1, 3).flatten(2)  # [g, c, k/g*r*s]
    return rows.reshape(blocks, space.size // blocks, -1).abs()


def _kept(readers: list[tuple[str, Slice]], patterns: Mapping[str, Pattern]) -> int:
    """Return the magnitude that the patterns keep in all weights that read a space, exactly comparable."""
    tensors = {name: piece.tensor.detach() for name, piece in readers}
    largest = max(float(tensor.abs().max()) for tensor in tensors.values())
    return sum(_magnitude(_survivors(tensor, patterns[name]), largest) for name, tensor in tensors.items())


def _magnitude(weight: Tensor, largest: float) -> int:
    return int((weight.double().abs() * (_FINE / largest)).round().long().sum()) if largest else 0


def _share_kept(weight: Tensor, pattern: Pattern) -> float:
    largest = float(weight.abs().max())
    return _magnitude(_survivors(weight, pattern), largest) / max(1, _magnitude(weight, largest))


def _survivors(weight: Tensor, pattern: Pattern) -> Tensor:
    weight = weight.contiguous()
    survivors = torch.empty_like(weight)
    keep_largest(weight, *pattern, out=survivors)
    return survivors


def _apply(space: Space, source: Tensor) -> None:
    """Put channel source[i] in place i, in every tensor that follows the space."""
    for piece in space.slices:
        tensor = piece.tensor.detach()
        if piece.groups == 1:
            stretch = tensor.narrow(piece.axis, piece.offset, space.size * piece.repeat)
            channels = stretch.unflatten(piece.axis, (space.size, piece.repeat))
            stretch.copy_(channels.index_select(piece.axis, source).flatten(piece.axis, piece.axis + 1))
            continue
        width = space.size // piece.groups
        for group, filters in enumerate(tensor.chunk(piece.groups)):  # views
            inside = source[group * width : (group + 1) * width] - group * width
            filters.copy_(filters.index_select(1, inside))
