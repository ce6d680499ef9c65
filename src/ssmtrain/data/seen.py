"""Which documents came before: a set of 16-byte digests in 21 to 43 bytes each."""

from __future__ import annotations

import numpy as np

SMALLEST = 2**12


class Seen:
    """A hash table of digests; all that is done to it is `add`."""

    def __init__(self) -> None:
        self._table = np.zeros((SMALLEST, 2), np.uint64)
        self._full = np.zeros(SMALLEST, bool)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, digests: np.ndarray) -> np.ndarray:
        """Add digests (n,) of 16 bytes; says which were new, bool (n,), the first of equal ones alone."""
        new = np.zeros(len(digests), bool)
        if not len(digests):
            return new
        _, first = np.unique(digests, return_index=True)
        first.sort()
        pairs = np.frombuffer(digests[first].tobytes(), np.uint64).reshape(-1, 2)  # (m, 2)
        while self._count + len(pairs) > 0.75 * len(self._table):
            self._grow()
        new[first[self._insert(pairs)]] = True
        return new

    def _grow(self) -> None:
        pairs = self._table[self._full]
        self._table = np.zeros((2 * len(self._table), 2), np.uint64)
        self._full = np.zeros(len(self._table), bool)
        self._count = 0
        self._insert(pairs)

    def _insert(self, pairs: np.ndarray) -> np.ndarray:
        """Put distinct pairs (m, 2) in their places; says which were not there yet, bool (m,)."""
        mask = np.uint64(len(self._table) - 1)
        slots = (pairs[:, 0] & mask).astype(np.int64)
        new = np.zeros(len(pairs), bool)
        todo = np.arange(len(pairs))
        while len(todo):
            at = slots[todo]
            taken = self._full[at]
            equal = taken & (self._table[at] == pairs[todo]).all(axis=1)
            free = np.flatnonzero(~taken)
            _, ahead = np.unique(at[free], return_index=True)  # of several that want one place, the first
            placed = free[ahead]
            self._table[at[placed]] = pairs[todo[placed]]
            self._full[at[placed]] = True
            new[todo[placed]] = True
            self._count += len(placed)
            left = ~equal
            left[placed] = False
            todo = todo[left]
            slots[todo] = (slots[todo] + taken[left]) & int(mask)
        return new
