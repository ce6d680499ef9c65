"""Which document of which file a place in the training split is."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmtrain.data.module import Rows
from ssmtrain.data.prepare import LIST
from ssmtrain.data.shards import TokenStream
from ssmtrain.data.tokenizer import ByteTokenizer, Tokenizer

PACKED = (".gz", ".xz", ".zst", ".jsonl", ".parquet")
"""Endings of files in which a document does not lie byte by byte."""
PREFIX = 2**18
"""Tokens of a document that are decoded to tell at which byte a later one stands."""


@dataclass(frozen=True)
class Place:
    """Where some tokens of a row come from."""

    document: int
    """Number of the document in the split, from 0."""
    token: int
    """The first of the tokens, counted from the document's first."""
    tokens: int
    """Tokens of the whole document, its end-of-text token included."""
    file: str | None
    """Path; None where the sources are not known document by document."""
    byte: int | None
    """Offset in the file of the first of the tokens."""
    exact: bool
    """Whether the offset is; that of a tokenizer that rewrites text is nearly so."""


class Documents:
    """The documents of a training split, in the order of its stream."""

    def __init__(self, rows: Rows, tokenizer: Tokenizer) -> None:
        assert isinstance(rows.stream, TokenStream), "a run reads what was prepared"
        self.stream, self.seq_len, self.tokenizer = rows.stream, rows.seq_len, tokenizer
        lines = (rows.stream.folder / LIST).read_text().splitlines()
        entries = [entry for entry in map(json.loads, lines) if entry["split"] == "train"]
        if sum(entry["documents"] for entry in entries) != len(self.stream.starts):
            entries = []  # some gave no tokens, or validate: which is not kept
        self.paths = [_shown(entry["path"]) for entry in entries if entry["documents"]]
        """Files that gave documents, in the order of the stream."""
        self.ends = np.cumsum([entry["documents"] for entry in entries if entry["documents"]])
        """Documents up to the end of each."""

    def place(self, row: int, position: int) -> Place:
        """Where the token at a position of a row (by file order) comes from."""
        at = min(row * self.seq_len + position, self.stream.tokens - 1)
        number = int(np.searchsorted(self.stream.starts, at, side="right")) - 1
        start, stop = self.bounds(number)
        exact = isinstance(self.tokenizer, ByteTokenizer)
        # Offsets are known where a file is one document from its first byte.
        byte = self._bytes(start, at, exact) if self._is_file(number) else None
        return Place(number, at - start, stop - start, self.file(number), byte, exact)

    def file(self, number: int) -> str | None:
        """The path of a document's file; of an embedded text its name, as offsets are those of the text."""
        return self.paths[self._entry(number)] if number < self.documents else None

    @property
    def documents(self) -> int:
        """How many the list of sources accounts for."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def _entry(self, number: int) -> int:
        return int(np.searchsorted(self.ends, number, side="right"))

    def _is_file(self, number: int) -> bool:
        """Whether a document is all of a plain text file."""
        if number >= self.documents:
            return False
        at = self._entry(number)
        alone = self.ends[at] - (self.ends[at - 1] if at else 0) == 1
        return bool(alone) and not self.paths[at].endswith(PACKED)

    def bounds(self, number: int) -> tuple[int, int]:
        """A document's tokens [start, stop) in the stream."""
        starts = self.stream.starts
        stop = int(starts[number + 1]) if number + 1 < len(starts) else self.stream.tokens
        return int(starts[number]), stop

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, int64, as many as there are."""
        out = np.zeros(max(0, min(stop, self.stream.tokens) - start), np.int64)
        if len(out):
            self.stream.read(start, out)
        return out

    def named(self, text: str) -> list[int]:
        """The documents whose file has this name, or this end of its path, or is this file."""
        whole = str(Path(text).expanduser().absolute())
        found = []
        for number in range(self.documents):
            path = str(self.file(number))
            if path in (text, whole) or path.endswith(f"/{text}"):
                found.append(number)
        return found

    def rows_of(self, number: int) -> Iterator[tuple[int, int, int]]:
        """The rows, by file order, that hold tokens of a document: each with its positions [first, stop)."""
        start, stop = self.bounds(number)
        L = self.seq_len
        for row in range(start // L, -(-stop // L)):
            yield row, max(start - row * L, 0), min(stop - row * L, L)

    def places_of(self, text: str) -> Iterator[tuple[int, int]]:
        """Each row in which a text begins, by file order, and the position at which it first does."""
        L, decode = self.seq_len, self.tokenizer.decode
        more = len(self.tokenizer.encode(text)) + 8  # where it stands it may be cut otherwise
        for row in range(-(-(self.stream.tokens - 1) // L)):
            ids = self.tokens(row * L, row * L + L + more)
            at = decode(ids).find(text)
            if 0 <= at < len(decode(ids[:L])):
                # The token that the character belongs to: the first prefix that reaches beyond it.
                position = bisect_right(range(L), at, key=lambda k: len(decode(ids[:k]))) - 1
                yield row, position

    def _bytes(self, start: int, at: int, exact: bool) -> int | None:
        if exact:
            return at - start
        if at - start > PREFIX:
            return None
        return len(self.tokenizer.decode(self.tokens(start, at)).encode())


def _shown(path: str) -> str:
    """A path, of an embedded text its name."""
    return Path(path).name.removesuffix(".xz") if "/corpora/" in path else path
