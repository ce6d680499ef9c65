"""Prepared tokens on disk: a split is a stream of tokens cut into shards, and where its documents start."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from pydantic import Field

from ssmtrain.config.base import Config
from ssmtrain.config.errors import UserError

SHARD_TOKENS = 2**27
"""Tokens in a full shard: 256 MiB of uint16."""


class ShardEntry(Config):
    """One file of the manifest."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*-([0-9]+|documents)\.bin$")]
    """Name inside the folder."""
    items: Annotated[int, Field(gt=0)]
    """Tokens in it (or document starts)."""
    sha256: str
    """SHA-256 of the file."""


class SplitEntry(Config):
    """One split of the manifest."""

    tokens: int
    """Tokens, one end-of-text per document included."""
    bytes: int
    """Bytes of UTF-8 text."""
    documents: int
    """Documents that gave at least one token."""
    empty: int
    """Documents that gave none and are left out."""
    shards: list[ShardEntry]
    """Token files, in order; all but the last hold `shard_tokens`."""
    starts: ShardEntry
    """Positions at which documents start, int64."""
    sha256: str
    """Digest of the split: SHA-256 over the digests of its files."""


class _HashedFile:
    """A file that is hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.items = 0
        self._file: BinaryIO = path.open("wb")
        self._hash = hashlib.sha256()

    def write(self, items: np.ndarray) -> None:
        data = items.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.items += len(items)

    def close(self) -> ShardEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ShardEntry(file=self.path.name, items=self.items, sha256=self._hash.hexdigest())


class SplitWriter:
    """Writes one split: `write` tokens of a document in any number of pieces, then `end_document`."""

    def __init__(self, folder: Path, split: str, dtype: str, eot: int, shard_tokens: int) -> None:
        self.folder, self.split, self.cap = folder, split, shard_tokens
        self.dtype = np.dtype(dtype)
        self.bytes = 0
        self._eot = np.array([eot], self.dtype)
        self._starts = array("q")
        self._tokens = self._document = self._empty = 0
        self._done: list[ShardEntry] = []
        self._file: _HashedFile | None = None

    def write(self, ids: np.ndarray) -> None:
        """Append tokens of the current document."""
        ids = ids.astype(self.dtype)
        while len(ids):
            if self._file is None:
                self._file = _HashedFile(self.folder / f"{self.split}-{len(self._done):05d}.bin")
            room = self.cap - self._file.items
            self._file.write(ids[:room])
            self._tokens += min(room, len(ids))
            ids = ids[room:]
            if self._file.items == self.cap:
                self._done.append(self._file.close())
                self._file = None

    def end_document(self) -> None:
        """Close the current document with an end-of-text token; one without tokens is left out."""
        if self._tokens == self._document:
            self._empty += 1
            return
        self._starts.append(self._document)
        self.write(self._eot)
        self._document = self._tokens

    def close(self) -> SplitEntry:
        """Write what is left and return the manifest's entry."""
        if self._file is not None:
            self._done.append(self._file.close())
        index = _HashedFile(self.folder / f"{self.split}-documents.bin")
        index.write(np.array(self._starts, dtype="<i8"))
        starts = index.close()
        digest = hashlib.sha256("".join(s.sha256 for s in [*self._done, starts]).encode()).hexdigest()
        return SplitEntry(
            tokens=self._tokens,
            bytes=self.bytes,
            documents=len(self._starts),
            empty=self._empty,
            shards=self._done,
            starts=starts,
            sha256=digest,
        )


class TokenStream:
    """One prepared split, memory-mapped: its tokens end to end, and where documents start."""

    def __init__(self, folder: Path, entry: SplitEntry, dtype: str, shard_tokens: int) -> None:
        self.entry = entry
        self.tokens = entry.tokens
        self._cap = shard_tokens
        self._shards = [_map(folder, s, dtype) for s in entry.shards]
        self.starts = _map(folder, entry.starts, "<i8")
        """Position of each document's first token, int64 (documents,), ascending from 0."""

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`, across shards; they must exist."""
        shard, at = divmod(start, self._cap)
        piece = self._shards[shard][at : at + len(out)]
        out[: len(piece)] = piece
        if len(piece) < len(out):
            self.read(start + len(piece), out[len(piece) :])


def sizes_match(folder: Path, entry: SplitEntry, dtype: str) -> bool:
    """Whether every file of the split is there and as long as the manifest says."""
    widths = [(s, np.dtype(dtype).itemsize) for s in entry.shards] + [(entry.starts, 8)]
    try:
        return all((folder / s.file).stat().st_size == s.items * width for s, width in widths)
    except OSError:
        return False


def verify(folder: Path, entry: SplitEntry, dtype: str, vocab_size: int) -> None:
    """Read a split through; UserError names the first damaged file and the offset, where one is known.

    Checked: token ids below `vocab_size`, document starts ascending from 0, SHA-256 of every file.
    """
    for shard in entry.shards:
        tokens = _map(folder, shard, dtype)
        for start, block in _blocks(tokens):
            if block.max() >= vocab_size:
                at = start + int(np.argmax(block >= vocab_size))
                found = f"token {at} (byte {at * tokens.itemsize}) is {tokens[at]}"
                raise _damaged(folder / shard.file, f"{found}, the vocabulary has {vocab_size}")
        _check_hash(folder / shard.file, tokens, shard.sha256)
    starts = _map(folder, entry.starts, "<i8")
    steps = np.diff(starts, append=entry.tokens)
    if starts[0] != 0 or steps.min() < 1:
        at = 0 if starts[0] != 0 else int(np.argmax(steps < 1))
        raise _damaged(folder / entry.starts.file, f"document {at} starts at {starts[at]}, out of order")
    _check_hash(folder / entry.starts.file, starts, entry.starts.sha256)


def _map(folder: Path, entry: ShardEntry, dtype: str) -> np.ndarray:
    """A file as a plain array over mapped memory: slicing an np.memmap costs several times as much."""
    return np.memmap(folder / entry.file, dtype, "r", shape=(entry.items,)).view(np.ndarray)


def _blocks(tokens: np.ndarray, size: int = 2**22) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(tokens), size):
        yield start, tokens[start : start + size]


def _check_hash(path: Path, items: np.ndarray, expected: str) -> None:
    digest = hashlib.sha256()
    for _, block in _blocks(items):
        digest.update(block.data)
    if digest.hexdigest() != expected:
        raise _damaged(path, f"its sha256 is {digest.hexdigest()[:16]}…, the manifest says {expected[:16]}…")


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"prepared data is damaged: {path}: {what}",
        f"delete {path.parent} and run again: it is made anew from the sources",
    )
