"""Numbers of any type as bytes: one run, or one for each byte of an element, whichever is smaller.

The bytes of a float are unlike: sign and exponent repeat, the last digits do not. Apart (`planes`), zstd finds the ones
and leaves the others as they are.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slope_compile.pack.header import Numbers
from slope_compile.pack.streams import LEVEL, Stored, stored

Bytes = npt.NDArray[np.uint8]


def encode_numbers(raw: Bytes, width: int, level: int = LEVEL) -> tuple[Numbers, list[Stored]]:
    """Return how bytes are laid out, and the runs that are stored.

    Args:
        raw: uint8, flat: the elements, little-endian.
        width: Bytes of an element.
        level: Of zstd.
    """
    best = [stored(raw, level)]
    if width > 1 and raw.size:
        planes = [stored(raw[index::width], level) for index in range(width)]
        if sum(len(run.data) for run in planes) < len(best[0].data):
            best = planes
    return Numbers(planes=len(best), streams=tuple((len(run.data), run.raw) for run in best)), best


def decode_numbers(runs: list[Bytes]) -> Bytes:
    """Return the bytes that `encode_numbers` was given, uint8, flat, writable."""
    if len(runs) == 1:
        return runs[0]
    out = np.empty(sum(run.size for run in runs), np.uint8)
    for index, run in enumerate(runs):
        out[index :: len(runs)] = run
    return out
