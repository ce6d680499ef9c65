"""Whose turn it is: sample numbers dealt out to sources by their shares, without chance and without history.

A period of turns is worked out once; every number is then looked up. Source i's turn j falls in the slots
[floor(j / s_i), ceil((j + 1) / s_i)) of its share s_i, and in each slot the source whose time ends first goes
(Baruah et al. 1996, "Proportionate progress"; Tijdeman 1980, "The chairman assignment problem"): after any
number of turns, a source has had its share to within less than one.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ssmtrain.data.order import random_bits

LIMIT = 2**16
"""Turns in a period, at most; shares that are no such fractions are rounded to it."""
MIXED = 2**12
"""Turns after which the same random order may come again, at least."""


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights, rounded where their sum would pass LIMIT.

    A weight above 0 keeps at least one turn. ValueError when no weight is above 0.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    if total <= 0:
        raise ValueError("one weight must be above 0")
    exact = [one / total for one in exact]
    period = math.lcm(*(one.denominator for one in exact))
    if period <= LIMIT:
        return [int(one * period) for one in exact]
    counts = [max(int(one * LIMIT), int(one > 0)) for one in exact]
    by_need = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i] * LIMIT, i))
    for i in by_need[: max(0, LIMIT - sum(counts))]:
        counts[i] += 1
    counts[counts.index(max(counts))] -= max(0, sum(counts) - LIMIT)
    divisor = math.gcd(*counts)
    return [count // divisor for count in counts]


class Turns:
    """Sources by turns in the ratio of their weights; among turns that may change places a key decides."""

    def __init__(self, weights: Sequence[float], key: int) -> None:
        shares = whole_shares(weights)
        repeats = -(-MIXED // sum(shares))
        self.table = _period(shares, repeats, key)  # (T,)
        self.each = np.bincount(self.table, minlength=len(shares))  # (sources,)
        before = np.empty(len(self.table), np.int64)
        for source in range(len(shares)):
            mine = self.table == source
            before[mine] = np.arange(mine.sum())
        self.before = before
        """(T,) turns that the source of a turn has had before it in the period."""

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each turn, and how many it has had before: int64, int64, the shape of numbers."""
        period, at = np.divmod(numbers, len(self.table))
        which = self.table[at]
        return which, period * self.each[which] + self.before[at]

    def had(self, number: int) -> np.ndarray:
        """Turns of each source among the first `number`, int64 (sources,)."""
        period, at = divmod(number, len(self.table))
        return period * self.each + np.bincount(self.table[:at], minlength=len(self.each))


def _period(shares: list[int], repeats: int, key: int) -> np.ndarray:
    """The sources of `repeats` times sum(shares) turns, int64, by earliest end."""
    period = sum(shares)
    chance = iter(random_bits(period * repeats, key).tolist())
    # By the slot in which it may begin: (the slot before which it must be had, a random number, whose it is).
    waiting: list[list[tuple[int, int, int]]] = [[] for _ in range(period * repeats)]
    for source, share in enumerate(shares):
        for turn in range(share * repeats):
            end = -(-(turn + 1) * period // share)
            waiting[turn * period // share].append((end, next(chance), source))
    table = np.empty(period * repeats, np.int64)
    ready: list[tuple[int, int, int]] = []
    for slot, new in enumerate(waiting):
        for turn_of in new:
            heapq.heappush(ready, turn_of)
        table[slot] = heapq.heappop(ready)[2]
    return table
