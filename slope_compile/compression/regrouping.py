"""The search for an order of input channels under which an n:m pattern keeps more magnitude.

Method: Pool and Yu, Channel Permutations for N:M Sparsity, NeurIPS 2021. A stripe is m neighbouring channels. Two
stripes are regrouped at a time: at 2:4 all 35 ways to share 8 channels out are tried, for other patterns all m² swaps
of one channel. Stripes meet as in a round-robin tournament, so the pairs of a round share none and are searched at
once. When no pair gains any more, a bounded number of losses is taken on purpose to leave the local optimum, and the
best order met is returned.

The result depends on the weights alone: magnitudes become integers small enough for every sum to be exact in float32,
whatever the order of summation, so all devices and numbers of threads decide alike. The bound is on work, not on time.

Letters: b blocks within which channels may move, c channels of a block, s = c/m stripes, p pairs of stripes, r rows,
m group size, n kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

EXACT = 2**24  # integers up to here are exact in float32
WORK = 2**28  # elements that the search of one order may touch: about half a second of one CPU core
CALL = 2**14  # elements that a vector operation costs at least, however few it touches
ESCAPES = 4  # times that it leaves a local optimum
SHAKEN = 8  # one stripe in so many gives a channel away when it does
CHUNK = 2**17  # elements of one vector operation: what stays in the cache

# The 35 ways to share 8 channels out to two stripes, channel 0 in the first; the first way is as they are.
_HALVES = [(0, *three) for three in itertools.combinations(range(1, 8), 3)]
_SHARES = [(*half, *(c for c in range(8) if c not in half)) for half in _HALVES]


def best_order(magnitude: Tensor, n: int, m: int, work: int = WORK) -> Tensor:
    """Return the channels in an order that keeps at least as much magnitude as their own.

    Args:
        magnitude: |W| with the channels in front, float (b, c, r); m divides c.
        n: Weights kept in a group.
        m: Group size.
        work: Elements to touch at most; the search ends early where it would take more.

    Returns:
        int64 (b, c): which channel of the block comes to each place.
    """
    blocks, channels = magnitude.shape[:2]
    order = torch.arange(channels, device=magnitude.device).repeat(blocks, 1)
    if n >= m or channels <= m or not magnitude.any():
        return order
    search = _Search(_whole_numbers(magnitude, n), n, m, work)
    search.settle(order)
    best, kept = order, search.kept(order)
    for turn in range(ESCAPES):
        if search.work <= 0:
            break
        order = _shaken(best, m, turn)
        search.settle(order)
        if (now := search.kept(order)) > kept:
            best, kept = order, now
    return best


def _whole_numbers(magnitude: Tensor, n: int) -> Tensor:
    """Scale to integers of which 2n a row can be summed over all rows in float32 without rounding."""
    most = EXACT // (2 * n * magnitude.shape[2])
    return (magnitude.double() * (max(most, 1) / magnitude.max().double())).round().float()


class _Search:
    """Regroups stripes of one matrix until nothing gains or the work is used up.

    Args:
        x: Whole numbers, float32 (b, c, r).
        n: Weights kept in a group.
        m: Group size.
        work: Elements that may be touched.
    """

    def __init__(self, x: Tensor, n: int, m: int, work: int) -> None:
        self.x, self.n, self.m, self.work = x, n, m, work
        self.regroup: Callable[[Tensor, int], tuple[Tensor, Tensor]] = _share_out if (n, m) == (2, 4) else _swap
        self.cost = 360 if (n, m) == (2, 4) else 14 * m * m  # vector operations a meeting, about

    def settle(self, order: Tensor) -> None:
        """Improve an order (b, c) in place."""
        rounds = _rounds(self.x.shape[1] // self.m)
        idle = 0  # rounds in a row without a gain
        for pairs in itertools.cycle(rounds):
            idle = 0 if self._play(order, pairs.to(order.device)) else idle + 1
            if idle == len(rounds) or self.work <= 0:
                return

    def kept(self, order: Tensor) -> int:
        """Return what the pattern keeps under an order, exactly."""
        total = 0
        for start in range(0, order.shape[1], self.m):  # a stripe at a time: no copy of the whole matrix
            stripe = _columns(self.x, order[:, start : start + self.m])
            total += int(stripe.topk(self.n, dim=1).values.sum(dtype=torch.float64))
        return total

    def _play(self, order: Tensor, pairs: Tensor) -> bool:
        """Let pairs (p, 2) of stripes meet in every block; return whether any gained."""
        blocks, rows = order.shape[0], self.x.shape[2]
        stripes = order.view(blocks, -1, self.m)
        gained = False
        for some in pairs.split(max(1, CHUNK // (blocks * rows))):
            columns = stripes[:, some].flatten(2)  # [b, p, 2m]
            met = _columns(self.x, columns.flatten(1)).view(-1, 2 * self.m, rows)  # [b*p, 2m, r]
            gain, places = self.regroup(met, self.n)
            self.work -= self.cost * max(CALL, met.shape[0] * rows)
            if bool((gain > 0).any()):
                gained = True
                moved = columns.gather(2, places.view_as(columns))
                stripes[:, some] = moved.view(blocks, -1, 2, self.m)
        return gained


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """Pick channels (b, k) of x (b, c, r)."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


def _rounds(stripes: int) -> list[Tensor]:
    """Return the rounds of a tournament in which each of `stripes` meets each other once: int64 (p, 2) each."""
    even = stripes + stripes % 2
    players, rounds = list(range(even)), []
    for _ in range(even - 1):
        pairs = [(players[i], players[-1 - i]) for i in range(even // 2)]
        rounds.append(torch.tensor([pair for pair in pairs if max(pair) < stripes]))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds


def _shaken(order: Tensor, m: int, turn: int) -> Tensor:
    """Swap channels between some stripes, others at every turn; no random numbers."""
    shaken = order.clone()
    stripes = shaken.view(shaken.shape[0], -1, m)
    count = stripes.shape[1]
    for first in range(turn % SHAKEN, count, SHAKEN):
        second, place = (first + 1 + turn * (count // 3)) % count, (turn + first) % m
        if first != second:
            stripes[:, [first, second], place] = stripes[:, [second, first], place]
    return shaken


def _share_out(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Try all ways to share two stripes' 8 channels out at 2:4; x is (p, 8, r).

    Returns:
        The gain (p,) of the best way, and that way as places (p, 8); where nothing gains, the places as they are.
    """
    both: dict[tuple[int, int], Tensor] = {}  # x_i + x_j
    larger: dict[tuple[int, int], Tensor] = {}  # max(x_i, x_j)
    for i, j in itertools.combinations(range(8), 2):
        both[i, j], larger[i, j] = x[:, i] + x[:, j], torch.maximum(x[:, i], x[:, j])
    kept = []
    for a, b, c, d, e, f, g, h in _SHARES:
        # The two largest of four: both of one pair, both of the other, or the larger of each.
        first = torch.maximum(both[a, b], both[c, d]).maximum(larger[a, b] + larger[c, d])
        second = torch.maximum(both[e, f], both[g, h]).maximum(larger[e, f] + larger[g, h])
        kept.append(first.add_(second).sum(dim=1))
    score, way = torch.stack(kept, dim=1).max(dim=1)  # of equal ones the first
    return score - kept[0], torch.tensor(_SHARES, device=x.device)[way]


def _swap(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Try every swap of one channel between two stripes; x is (p, 2m, r).

    Without channel i a group keeps its n - 1 largest others, and the larger of the n-th and of what comes in.

    Returns:
        As `_share_out`.
    """
    m = x.shape[1] // 2
    a, b = x[:, :m], x[:, m:]  # [p, m, r]
    now_a, rest_a, nth_a = _without_one(a, n)
    now_b, rest_b, nth_b = _without_one(b, n)
    rows = []
    for i in range(m):
        to_a = torch.maximum(nth_a[:, i : i + 1], b).sum(dim=2)  # [p, m]: b_j comes for a_i
        to_b = torch.maximum(nth_b, a[:, i : i + 1]).sum(dim=2)  # a_i comes for b_j
        rows.append(rest_a[:, i : i + 1] + rest_b + to_a + to_b)
    score, best = torch.cat(rows, dim=1).max(dim=1)  # [p], over i * m + j
    gain = score - (now_a + now_b)
    places = torch.arange(2 * m, device=x.device).repeat(x.shape[0], 1)
    from_a, from_b = best[:, None] // m, best[:, None] % m + m
    swapped = places.scatter(1, from_a, from_b).scatter(1, from_b, from_a)
    return gain, torch.where(gain[:, None] > 0, swapped, places)


def _without_one(x: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Look at groups (p, m, r) with one member gone.

    Returns:
        Kept now (p,); for each member gone the sum of the n - 1 largest others (p, m), and the n-th other (p, m, r).
    """
    top = x.topk(n + 1, dim=1).values  # [p, n + 1, r]
    last, next_ = top[:, n - 1 : n], top[:, n:]
    sums = top[:, :n].sum(dim=1, keepdim=True)  # [p, 1, r]
    rest = (sums - torch.maximum(x, last)).sum(dim=2)
    return sums.sum(dim=(1, 2)), rest, torch.where(x >= last, next_, last)
