"""A sha256 that a thread computes while the caller goes on writing: hashing leaves Python's lock."""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor

WORTH_A_THREAD = 2**20
"""Bytes above which hashing them takes longer than handing them over."""


class Digest:
    """sha256 of pieces, the large ones hashed by a thread of its own."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def update(self, piece: memoryview | bytes) -> None:
        """Take the next piece, whose bytes must not change before the next call."""
        self._wait()
        if len(piece) < WORTH_A_THREAD:
            self._digest.update(piece)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, "ssmtrain-hash")
        self._pending = self._thread.submit(self._digest.update, piece)

    def hexdigest(self) -> str:
        """The hash (hex) of everything so far."""
        self._wait()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread; the hash can still be asked for."""
        self._wait()
        if self._thread:
            self._thread.shutdown()

    def _wait(self) -> None:
        if self._pending:
            self._pending.result()
            self._pending = None
