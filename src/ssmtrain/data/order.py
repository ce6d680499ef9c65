"""The order of rows: a keyed permutation that is a pure function of (seed, epoch, position)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

ROUNDS = 8
BLOCK = 2048
"""Positions permuted at once."""
KEPT = 4
"""Blocks that are remembered."""
MIN_BITS = 4  # below that, a Feistel network has too few halves to mix; cycle walking covers the rest


def permute(position: np.ndarray | int, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the keyed permutation of range(n) sends each position; int64, same shape as `position`.

    An unbalanced Feistel network over the smallest power of two that holds n, with cycle walking: values
    outside range(n) are sent through again, at most a few times (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"). ValueError when a position is outside range(n).
    """
    x = np.atleast_1d(np.asarray(position, dtype=np.int64))
    if n < 1 or (x.size and (int(x.min()) < 0 or int(x.max()) >= n)):
        raise ValueError(f"positions must lie in range({n})")
    bits = max(MIN_BITS, (n - 1).bit_length())
    keys = _keys(seed, epoch)
    out = feistel(x.astype(np.uint64), bits, keys)
    outside = out >= np.uint64(n)
    while outside.any():
        out[outside] = feistel(out[outside], bits, keys)
        outside = out >= np.uint64(n)
    return out.astype(np.int64).reshape(np.shape(position))


class Order:
    """The order of n rows, another one each epoch; without a seed always the rows' own.

    A few positions take as long to permute as thousands, so it is done a block of them at a time.
    """

    def __init__(self, n: int, seed: int | None) -> None:
        self.n, self.seed = n, seed
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def __call__(self, numbers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of range(n) that sample numbers stand for, which run on from epoch to epoch; int64 (B,)."""
        epoch, position = np.divmod(np.asarray(numbers, np.int64), self.n)
        if self.seed is None:
            return position
        rows, block = np.empty_like(position), position // BLOCK
        for e, b in sorted(set(zip(epoch.tolist(), block.tolist(), strict=True))):
            here = (epoch == e) & (block == b)
            rows[here] = self._block(self.seed, e, b)[position[here] - b * BLOCK]
        return rows

    def _block(self, seed: int, epoch: int, block: int) -> np.ndarray:
        key = epoch, block
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            first = block * BLOCK
            positions = np.arange(first, min(first + BLOCK, self.n))
            self._known[key] = permute(positions, self.n, seed, epoch)
        return self._known[key]


def walk(numbers: np.ndarray, n: int, slots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of range(n) that sample numbers (B,) stand for where each slot reads rows that follow each other.

    Sample number s is of slot s mod slots. In an epoch of n // slots steps each slot reads one of as many
    stretches of the circle of rows, all equally long; fewer rows than slots are left out. Where the first
    stretch begins, and which one a slot reads, follow from (seed, epoch). Returns rows, int64 (B,), and
    whether each is the first of its stretch, bool (B,). ValueError when there are fewer rows than slots.
    """
    length = n // slots
    if length < 1:
        raise ValueError(f"{n} rows are too few for {slots} slots")
    epoch, within = np.divmod(np.asarray(numbers, np.int64), slots * length)
    step, slot = np.divmod(within, slots)
    rows, key = np.empty_like(step), key_of("ssmtrain slots", seed)
    for e in np.unique(epoch):
        here = epoch == e
        first = key_of("ssmtrain stretches", seed, int(e)) % n
        stretch = permute(slot[here], slots, key, int(e))
        rows[here] = (first + stretch * length + step[here]) % n
    return rows, step == 0


def key_of(*words: str | int) -> int:
    """A number below 2**63 that follows from some words, as a seed of their own."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def random_bits(n: int, key: int) -> np.ndarray:
    """n numbers that follow from a key, uint64 (n,): splitmix64 from that state."""
    steps = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix(steps + np.uint64(key))


def feistel(x: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of range(2**bits): halves of unequal width swap places each round."""
    low, high = bits // 2, bits - bits // 2  # widths of the two halves
    right = x & np.uint64((1 << low) - 1)
    left = x >> np.uint64(low)
    for key in keys:
        left, right = right, (left ^ mix(right + key)) & np.uint64((1 << high) - 1)
        low, high = high, low
    return (left << np.uint64(low)) | right


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _keys(seed: int, epoch: int) -> np.ndarray:
    """One 64-bit key a round, from BLAKE2b of seed and epoch: the same on every machine and version."""
    digest = hashlib.blake2b(f"ssmtrain order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)
