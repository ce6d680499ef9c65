"""Which document of which file a place in the training split is."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssmtrain.config.schema import RunConfig
from ssmtrain.data.module import Data
from ssmtrain.data.sources import open_source
from ssmtrain.data.spans import Member, Span
from ssmtrain.data.tokenizer import ByteTokenizer, Tokenizer

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
    """The documents of the training split, in the order of its stream."""

    def __init__(self, config: RunConfig, data: Data, tokenizer: Tokenizer) -> None:
        self.stream, self.seq_len, self.tokenizer = data.train.stream, config.data.seq_len, tokenizer
        spans = [s for s in open_source(config.data).splits["train"] if s.stop > s.start]
        # Where documents gave no tokens, which ones is not kept: then their numbers name no files.
        self.spans: list[Span] | None = spans if len(spans) == len(self.stream.starts) else None

    def place(self, row: int, position: int) -> Place:
        """Where the token at a position of a row (by file order) comes from."""
        at = min(row * self.seq_len + position, self.stream.tokens - 1)
        number = int(np.searchsorted(self.stream.starts, at, side="right")) - 1
        start, stop = self.bounds(number)
        byte, exact = None, isinstance(self.tokenizer, ByteTokenizer)
        if self.spans is not None:
            skipped = self._bytes(start, at, exact)
            byte = None if skipped is None else self.spans[number].start + skipped
        return Place(number, at - start, stop - start, self.file(number), byte, exact)

    def file(self, number: int) -> str | None:
        """The path of a document's file; of an embedded text its name, as offsets are those of the text."""
        if self.spans is None:
            return None
        file = self.spans[number].file
        return file.path.name.removesuffix(".xz") if isinstance(file, Member) else str(file.path)

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
        for number in range(len(self.spans or [])):
            path = str(self.file(number))
            if path in (text, whole) or path.endswith(f"/{text}"):
                found.append(number)
        return found

    def rows_of(self, number: int) -> range:
        """The rows, by file order, that hold tokens of a document."""
        start, stop = self.bounds(number)
        return range(start // self.seq_len, -(-stop // self.seq_len))

    def places_of(self, text: str) -> Iterator[tuple[int, Place]]:
        """Each row in which a text begins, by file order, and where it first does."""
        L, decode = self.seq_len, self.tokenizer.decode
        more = len(self.tokenizer.encode(text)) + 8  # where it stands it may be cut otherwise
        for row in range(-(-(self.stream.tokens - 1) // L)):
            ids = self.tokens(row * L, row * L + L + more)
            at = decode(ids).find(text)
            if 0 <= at < len(decode(ids[:L])):
                # The token that the character belongs to: the first prefix that reaches beyond it.
                position = bisect_right(range(L), at, key=lambda k: len(decode(ids[:k]))) - 1
                yield row, self.place(row, position)

    def _bytes(self, start: int, at: int, exact: bool) -> int | None:
        if exact:
            return at - start
        if at - start > PREFIX:
            return None
        return len(self.tokenizer.decode(self.tokens(start, at)).encode())
