"""Corruptions of one layer's codes and scales, which several artifacts hold.

Letters: K output channels, C input channels, R and S the kernel; codes int8 (K, C, R, S) or (K, C), scale float32 (K,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True)
class Coded:
    """What is stored of one weight."""

    codes: Array
    scale: Array


@dataclass(frozen=True)
class WeightKind:
    """A corruption, of which layer, and whether it breaks a law by itself (pattern, range, scale)."""

    kind: str
    change: Callable[[Coded], Coded]
    lawless: bool = False
    layer: str = "conv.weight"


def _codes(change: Callable[[Array], None]) -> Callable[[Coded], Coded]:
    def changed(coded: Coded) -> Coded:
        codes = coded.codes.copy()
        change(codes)
        return replace(coded, codes=codes)

    return changed


def _scale(change: Callable[[Array], None]) -> Callable[[Coded], Coded]:
    def changed(coded: Coded) -> Coded:
        scale = coded.scale.copy()
        change(scale)
        return replace(coded, scale=scale)

    return changed


def _group(codes: Array) -> tuple[int, ...]:
    """Return where a group of 4 input channels with exactly 2 nonzero codes begins: (k, c, r, s)."""
    k, c = codes.shape[:2]
    groups = np.count_nonzero(codes.reshape(k, c // 4, 4, -1), axis=2)
    o, g, p = np.argwhere(groups == 2)[0]
    rest = np.unravel_index(p, codes.shape[2:]) if codes.ndim > 2 else ()
    return (int(o), int(g) * 4, *(int(i) for i in rest))


def flip_bit(codes: Array) -> None:
    """The lowest bit of one nonzero code that stays nonzero and in range: the smallest change there is."""
    place = tuple(np.argwhere((np.abs(codes) > 1) & (np.abs(codes) < 7))[0])
    codes[place] ^= 1


def flip_sign(codes: Array) -> None:
    place = tuple(np.argwhere(codes)[0])
    codes[place] = -codes[place]


def break_mask(codes: Array) -> None:
    k, c, *rest = _group(codes)
    free = next(i for i in range(4) if codes[(k, c + i, *rest)] == 0)
    codes[(k, c + free, *rest)] = 1


def move_in_mask(codes: Array) -> None:
    """A code moves to a free place of its group: still two of four."""
    k, c, *rest = _group(codes)
    taken = next(i for i in range(4) if codes[(k, c + i, *rest)])
    free = next(i for i in range(4) if not codes[(k, c + i, *rest)])
    codes[(k, c + free, *rest)] = codes[(k, c + taken, *rest)]
    codes[(k, c + taken, *rest)] = 0


def _two_channels(codes: Array) -> None:
    codes[[0, 1]] = codes[[1, 0]]


def _whole_channels(coded: Coded) -> Coded:
    order = np.arange(len(coded.codes))
    order[[0, 1]] = order[[1, 0]]
    return Coded(coded.codes[order], coded.scale[order])


def _input_channels(codes: Array) -> None:
    codes[:, [0, 1]] = codes[:, [1, 0]]


def _transposed(coded: Coded) -> Coded:
    return replace(coded, codes=np.ascontiguousarray(coded.codes.swapaxes(0, 1)))


def _turned(coded: Coded) -> Coded:
    return replace(coded, codes=np.ascontiguousarray(coded.codes[:, :, ::-1, ::-1]))


def _kernel_transposed(coded: Coded) -> Coded:
    return replace(coded, codes=np.ascontiguousarray(coded.codes.swapaxes(2, 3)))


def _halved(coded: Coded) -> Coded:
    codes, scale = coded.codes.copy(), coded.scale.copy()
    codes[0], scale[0] = codes[0] // 2, scale[0] * 2
    return Coded(codes, scale)


def _negated(coded: Coded) -> Coded:
    """The same products: one channel's codes and its scale both change sign."""
    codes, scale = coded.codes.copy(), coded.scale.copy()
    codes[0], scale[0] = -codes[0], -scale[0]
    return Coded(codes, scale)


def _put(place: Any, value: float) -> Callable[[Array], None]:
    def change(array: Array) -> None:
        array[place] = value

    return change


def _times(factor: float, place: Any = 0) -> Callable[[Array], None]:
    def change(scale: Array) -> None:
        scale[place] *= np.float32(factor)

    return change


def _reversed(scale: Array) -> None:
    scale[:] = scale[::-1].copy()


def _neighbours(scale: Array) -> None:
    scale[[2, 3]] = scale[[3, 2]]


def _last_bit(scale: Array) -> None:
    scale[1] = np.nextafter(scale[1], np.float32(1))


def _mean(scale: Array) -> None:
    scale[:] = scale.mean()


def _bit_30(scale: Array) -> None:
    """An exponent bit of one scale, as a memory error would."""
    scale.view(np.uint32)[0] ^= 1 << 30


WEIGHT_KINDS = [
    WeightKind("lowest bit of one code flipped", _codes(flip_bit)),
    WeightKind("sign of one code flipped", _codes(flip_sign)),
    WeightKind("mask broken in one group of four", _codes(break_mask), lawless=True),
    WeightKind("one code moved within its group: still 2:4", _codes(move_in_mask)),
    WeightKind("codes of two output channels exchanged", _codes(_two_channels)),
    WeightKind("two output channels exchanged with their scales", _whole_channels),
    WeightKind("two input channels of one group exchanged: still 2:4", _codes(_input_channels)),
    WeightKind("square convolution transposed", _transposed, lawless=True),
    WeightKind("square matrix transposed", _transposed, lawless=True, layer="mix.weight"),
    WeightKind("kernel turned by 180 degrees", _turned),
    WeightKind("kernel's height and width exchanged", _kernel_transposed),
    WeightKind("one output channel all zero", _codes(_put(0, 0))),
    WeightKind("every code zero", _codes(_put(slice(None), 0))),
    WeightKind("one scale doubled", _scale(_times(2))),
    WeightKind("every scale halved", _scale(_times(0.5, slice(None)))),
    WeightKind("one scale off by its last bit", _scale(_last_bit)),
    WeightKind("one scale negative", _scale(_times(-1)), lawless=True),
    WeightKind("codes and scale of a channel both negated: the same products", _negated, lawless=True),
    WeightKind("one channel's codes halved and its scale doubled", _halved),
    WeightKind("one scale zero", _scale(_put(0, 0)), lawless=True),
    WeightKind("one scale NaN", _scale(_put(0, np.nan)), lawless=True),
    WeightKind("one scale infinite", _scale(_put(0, np.inf)), lawless=True),
    WeightKind("one scale denormal", _scale(_put(0, 1e-41))),
    WeightKind("an exponent bit of one scale flipped", _scale(_bit_30)),
    WeightKind("scales of two channels exchanged", _scale(_neighbours)),
    WeightKind("scales in reverse order", _scale(_reversed)),
    WeightKind("one scale for all channels", _scale(_mean)),
]  # fmt: skip
CORE = [kind for kind in WEIGHT_KINDS if kind.kind in {
    "lowest bit of one code flipped", "mask broken in one group of four", "codes of two output channels exchanged",
    "two input channels of one group exchanged: still 2:4", "square matrix transposed", "one scale doubled",
    "one scale negative", "one scale NaN", "one scale zero", "scales of two channels exchanged",
}]  # fmt: skip
