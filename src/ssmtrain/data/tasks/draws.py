"""Random numbers that belong to a row: a pure function of (stream, seed, row), whatever the row's company."""

from __future__ import annotations

import hashlib

import numpy as np

from ssmtrain.data.order import MIN_BITS, ROUNDS, feistel, mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Step of a row's counter (Steele et al. 2014: splitmix64)."""


class Draws:
    """Numbers for some rows: each call goes on where the last ended, in every row."""

    def __init__(self, stream: str, seed: int, rows: np.ndarray) -> None:
        digest = hashlib.blake2b(f"ssmtrain task {stream} {seed}".encode(), digest_size=16).digest()
        first, second = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        self.keys = mix(mix(rows.astype(np.uint64) + first) + second)[:, None]  # (B, 1)
        self.used = 0

    def bits(self, count: int) -> np.ndarray:
        """64 random bits each; uint64 (B, count)."""
        at = np.arange(self.used + 1, self.used + count + 1, dtype=np.uint64)
        self.used += count
        return mix(self.keys + at * _GOLDEN)

    def below(self, n: int | np.ndarray, count: int) -> np.ndarray:
        """Whole numbers of range(n), n at most 2^31; n may be (B, 1); int64 (B, count)."""
        n = np.asarray(n).astype(np.uint64)
        return (((self.bits(count) >> np.uint64(32)) * n) >> np.uint64(32)).astype(np.int64)

    def distinct(self, n: int, count: int) -> np.ndarray:
        """Different whole numbers of range(n), in random order: the start of a keyed permutation of each row;
        int64 (B, count)."""
        width = max(MIN_BITS, (n - 1).bit_length())
        keys = self.bits(ROUNDS).T[:, :, None]  # (ROUNDS, B, 1)
        x = np.broadcast_to(np.arange(count, dtype=np.uint64), (len(self.keys), count))
        out = feistel(x, width, keys)
        while (outside := out >= np.uint64(n)).any():
            out = np.where(outside, feistel(out, width, keys), out)
        return out.astype(np.int64)

    def places(self, weights: np.ndarray, count: int) -> np.ndarray:
        """Different places of range(len(weights)), one after another, each by its share of the weights left:
        the order in which exponential clocks of these rates ring (Efraimidis & Spirakis 2006); int64
        (B, count)."""
        uniform = ((self.bits(len(weights)) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        rings = -np.log(uniform) / weights  # (B, n)
        return np.argsort(rings, axis=1, kind="stable")[:, :count]
