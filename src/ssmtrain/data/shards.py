"""Prepared tokens on disk: a split is a stream of tokens cut into shards, and where its documents start."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from pydantic import Field

from ssmtrain.config.base import Config
from ssmtrain.config.errors import UserError
from ssmtrain.digest import Digest

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
    duplicates: int
    """Documents whose text came before and that are left out."""
    skipped: int
    """Documents that cannot be read as text and are left out."""
    shards: list[ShardEntry]
    """Token files, in order; all but the last hold `shard_tokens`."""
    starts: ShardEntry
    """Positions at which documents start, int64."""
    sha256: str
    """Digest of the split: SHA-256 over the digests of its files."""


class Damaged(Exception):
    """What an interrupted preparation left is not what it noted."""


class _HashedFile:
    """A file that is hashed while it is written, by a thread where that pays; begun anew, or gone on with
    after its first `items`, whose hash must be what was noted."""

    def __init__(self, path: Path, dtype: np.dtype, items: int = 0, noted: str = "") -> None:
        self.path, self.items = path, items
        self._digest = Digest()
        self._file: BinaryIO = path.open("r+b" if items else "wb")
        left = items * dtype.itemsize
        while left:
            data = self._file.read(min(left, 2**24))
            if not data:
                raise Damaged(path)
            self._digest.update(data)
            left -= len(data)
        if items and self.sha256 != noted:
            raise Damaged(path)
        self._file.truncate()

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written so far."""
        return self._digest.hexdigest()

    def write(self, items: np.ndarray) -> None:
        """Append items, which nobody may change before the next call."""
        data = items.view(np.uint8).data if len(items) else b""
        self._digest.update(data)
        self._file.write(data)
        self.items += len(items)

    def handle(self) -> int:
        """A descriptor of its own for whoever syncs what was written so far, and closes it."""
        self._file.flush()
        return os.dup(self._file.fileno())

    def close(self) -> ShardEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.abandon()
        return ShardEntry(file=self.path.name, items=self.items, sha256=self.sha256)

    def abandon(self) -> None:
        self._digest.close()
        self._file.close()


class WriterState(Config):
    """Where a split's writer stands; what it wrote beyond that is cut off when it goes on."""

    tokens: int = 0
    bytes: int = 0
    documents: int = 0
    empty: int = 0
    duplicates: int = 0
    skipped: int = 0
    begins: int = 0
    """Where the document that is being written begins."""
    done: list[ShardEntry] = []
    starts_sha256: str = ""
    """SHA-256 of the starts so far."""
    file_sha256: str = ""
    """SHA-256 of the shard that is being written, empty where none is."""


class SplitWriter:
    """Writes one split: documents whole (`append`), or in any number of pieces (`write`, `end_document`)."""

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        eot: int,
        shard_tokens: int,
        state: WriterState | None = None,
    ) -> None:
        self.folder, self.split, self.cap = folder, split, shard_tokens
        self.dtype = np.dtype(dtype)
        at = state or WriterState()
        self.tokens, self.bytes, self.documents, self.empty = at.tokens, at.bytes, at.documents, at.empty
        self.duplicates, self.skipped, self._begins = at.duplicates, at.skipped, at.begins
        self._done = list(at.done)
        self._eot = np.array([eot], self.dtype)
        self._starts = _HashedFile(
            folder / f"{split}-documents.bin", np.dtype("<i8"), at.documents, at.starts_sha256
        )
        self._file: _HashedFile | None = None
        inside = at.tokens - sum(s.items for s in at.done)
        if inside:
            self._file = _HashedFile(self._path(), self.dtype, inside, at.file_sha256)

    def state(self) -> WriterState:
        """Where it stands."""
        names = ("tokens", "bytes", "documents", "empty", "duplicates", "skipped")
        return WriterState(
            **{name: getattr(self, name) for name in names},
            begins=self._begins,
            done=list(self._done),
            starts_sha256=self._starts.sha256,
            file_sha256=self._file.sha256 if self._file is not None else "",
        )

    def handles(self) -> list[int]:
        """Descriptors of the files that are being written, for whoever syncs and closes them."""
        return [file.handle() for file in (self._starts, self._file) if file is not None]

    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self._done):05d}.bin"

    def write(self, ids: np.ndarray) -> None:
        """Append tokens of the current document."""
        ids = np.ascontiguousarray(ids, self.dtype)
        while len(ids):
            if self._file is None:
                self._file = _HashedFile(self._path(), self.dtype)
            room = self.cap - self._file.items
            self._file.write(ids[:room])
            self.tokens += min(room, len(ids))
            ids = ids[room:]
            if self._file.items == self.cap:
                self._done.append(self._file.close())
                self._file = None

    def end_document(self) -> None:
        """Close the current document with an end-of-text token; one without tokens is left out."""
        if self.tokens == self._begins:
            self.empty += 1
            return
        self._starts.write(np.array([self._begins], "<i8"))
        self.documents += 1
        self.write(self._eot)
        self._begins = self.tokens

    def append(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append whole documents of `lengths` (n,) tokens, end of text included; those of 0 are left out."""
        some = lengths[lengths > 0]
        self.empty += len(lengths) - len(some)
        self._starts.write((self.tokens + np.cumsum(some) - some).astype("<i8"))
        self.documents += len(some)
        self.write(ids)
        self._begins = self.tokens

    def close(self) -> SplitEntry | None:
        """Write what is left and return the manifest's entry; None when there is not one token."""
        if self._file is not None:
            self._done.append(self._file.close())
        if not self.documents:
            self._starts.abandon()
            return None
        starts = self._starts.close()
        digest = _digest([*self._done, starts])
        return SplitEntry(
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.documents,
            empty=self.empty,
            duplicates=self.duplicates,
            skipped=self.skipped,
            shards=self._done,
            starts=starts,
            sha256=digest,
        )


class TokenStream:
    """One prepared split, memory-mapped: its tokens end to end, and where documents start."""

    def __init__(self, folder: Path, entry: SplitEntry, dtype: str, shard_tokens: int) -> None:
        self.folder, self.entry = folder, entry
        self.tokens = entry.tokens
        self._cap = shard_tokens
        self._shards = [_map(folder, s, dtype) for s in entry.shards]
        for shard in self._shards:
            # Else each row that is not in memory brings thirty that no one reads.
            _advise(shard, "MADV_RANDOM")
        self.starts = _map(folder, entry.starts, "<i8")
        """Position of each document's first token, int64 (documents,), ascending from 0."""

    def read(self, start: int, out: np.ndarray) -> None:
        """Copy tokens [start, start + len(out)) into `out`, across shards; they must exist."""
        shard, at = divmod(start, self._cap)
        piece = self._shards[shard][at : at + len(out)]
        out[: len(piece)] = piece
        if len(piece) < len(out):
            self.read(start + len(piece), out[len(piece) :])

    def ahead(self, starts: Iterable[int], length: int) -> None:
        """Ask the system for `length` tokens from each of some places, all at once: a read waits for one."""
        for start in starts:
            end = min(start + length, self.tokens)
            while start < end:
                shard, at = divmod(start, self._cap)
                last = min(at + end - start, self._cap)
                _advise(self._shards[shard], "MADV_WILLNEED", at, last)
                start += last - at


def ailing(folder: Path, entry: SplitEntry, dtype: str, shard_tokens: int) -> str | None:
    """What is wrong with a split's counts, or with its files' names and sizes; None where nothing is."""
    items = [s.items for s in entry.shards]
    whole = items and all(n == shard_tokens for n in items[:-1]) and items[-1] <= shard_tokens
    if not whole or sum(items) != entry.tokens or entry.documents != entry.starts.items:
        return "manifest.json: its counts do not agree"
    names = [s.file for s in (*entry.shards, entry.starts)]
    again = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if again is not None:
        return f"manifest.json: it lists {again} twice"
    widths = [(s, np.dtype(dtype).itemsize) for s in entry.shards] + [(entry.starts, 8)]
    for shard, width in widths:
        try:
            size = (folder / shard.file).stat().st_size
        except OSError as error:
            return f"{shard.file}: {error.strerror}"
        if size != shard.items * width:
            return f"{shard.file}: {size:,} bytes, the manifest says {shard.items * width:,}"
    return None


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
    # Each is looked at by itself too: a difference of two far numbers may wrap round.
    wrong = (steps < 1) | (starts < 0) | (starts >= entry.tokens)
    if starts[0] != 0 or wrong.any():
        at = 0 if starts[0] != 0 else int(np.argmax(wrong))
        raise _damaged(folder / entry.starts.file, f"document {at} starts at {starts[at]}, out of order")
    _check_hash(folder / entry.starts.file, starts, entry.starts.sha256)
    if entry.sha256 != _digest([*entry.shards, entry.starts]):
        raise _damaged(folder / "manifest.json", "its digest of a split is not that of the split's files")


def verify_file(path: Path, expected: str) -> None:
    """Read a small file of a prepared folder through; UserError when it is not the one that was written."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or "cannot be read") from None
    _check_hash(path, np.frombuffer(data, np.uint8), expected)


def _digest(files: Sequence[ShardEntry]) -> str:
    return hashlib.sha256("".join(file.sha256 for file in files).encode()).hexdigest()


def _map(folder: Path, entry: ShardEntry, dtype: str) -> np.ndarray:
    """A file as a plain array over mapped memory: slicing an np.memmap costs several times as much."""
    return np.memmap(folder / entry.file, dtype, "r", shape=(entry.items,)).view(np.ndarray)


def _advise(tokens: np.ndarray, how: str, first: int = 0, last: int | None = None) -> None:
    """Tell the system how tokens [first, last) of a mapped file will be read, where it can be told."""
    mapped = getattr(tokens.base, "_mmap", None)
    advice = getattr(mmap, how, None)
    if mapped is None or advice is None:
        return
    begin = first * tokens.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
    end = (len(tokens) if last is None else last) * tokens.itemsize
    with contextlib.suppress(OSError):
        mapped.madvise(advice, begin, end - begin)


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
