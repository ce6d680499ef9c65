"""A source as units of work: the same units in the same order, whatever number of processes does them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from ssmtrain.data import jsonl
from ssmtrain.data.spans import (
    BadText,
    Entry,
    Records,
    Remote,
    Source,
    Span,
    cut_span,
    cut_text,
    pieces,
    small,
)
from ssmtrain.data.unpack import open_packed

if TYPE_CHECKING:
    from collections.abc import Iterable

UNIT = 2**23
"""Bytes of text in a unit, about."""
LONG = 2**24
"""A plain or packed text of more bytes is several units."""
DOCUMENTS = 4096
"""Documents in a unit, at most."""


@dataclass(frozen=True)
class Unit:
    """Some documents in a row, or a part of a long one; what to read, or what was read."""

    entry: int
    """Number of the source's entry (train, then val) that the first document is of."""
    opens: bool = True
    """Whether the first document begins here."""
    closes: bool = True
    """Whether the last document ends here; a unit with a part of a document has nothing else."""
    digest: bytes | None = None
    """Of a long document whose first part this is, where duplicates are left out."""
    bad: bool = False
    """Whether this is a part of a long document that is left out, as it cannot be read as text."""

    @property
    def one_each(self) -> bool:
        """Whether every document is an entry of its own."""
        return False

    def documents(self) -> Iterator[list[str] | BadText]:
        """Each document as pieces of text, or why it is none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Files(Unit):
    """Plain text files, a document each; or a part of one."""

    spans: tuple[Span, ...] = ()

    @property
    def one_each(self) -> bool:
        """Every file is an entry."""
        return True

    def documents(self) -> Iterator[list[str] | BadText]:
        """Each file's text."""
        for span in self.spans:
            if self.bad:
                yield []
                continue
            try:
                yield [small(span)] if span.stop - span.start <= 2**20 else list(pieces(span))
            except BadText as error:
                yield error


@dataclass(frozen=True, kw_only=True)
class Lines(Unit):
    """The JSON lines that begin in a range of bytes of a plain file."""

    records: Records
    start: int
    stop: int

    def documents(self) -> Iterator[list[str] | BadText]:
        """The text of each line."""
        return jsonl.read_range(self.records.file, self.records.key, self.start, self.stop)


@dataclass(frozen=True, kw_only=True)
class Block(Unit):
    """JSON lines that were unpacked."""

    records: Records
    data: bytes
    line: int
    """Number of the first, from 1."""

    def documents(self) -> Iterator[list[str] | BadText]:
        """The text of each line."""
        return jsonl.read_lines(self.data, self.records.file, self.records.key, lambda _, i: self.line + i)


@dataclass(frozen=True, kw_only=True)
class Texts(Unit):
    """Texts that were read from a table, or pieces of one packed text (`opens`, `closes`)."""

    name: str
    """Where from, for errors."""
    number: int
    """Of the first record, from 1."""
    texts: list[str | bytes | None]

    def documents(self) -> Iterator[list[str] | BadText]:
        """Each text; or all of them as pieces of one."""
        if not (self.opens and self.closes) or self.number == 0:
            yield [] if self.bad else [t for t in self.texts if isinstance(t, str)]
            return
        for i, text in enumerate(self.texts):
            try:
                yield [_whole(text)]
            except (ValueError, TypeError) as error:
                yield BadText(f"{self.name}: record {self.number + i}: {error}")


def _whole(text: str | bytes | None) -> str:
    """A table's text as one that can be written as UTF-8; ValueError or TypeError says why not."""
    if isinstance(text, str):
        text.encode()  # a lone surrogate
        return text
    if isinstance(text, bytes):
        return text.decode()
    raise TypeError("its text is null" if text is None else f"its text is a {type(text).__name__}")


def units(source: Source) -> Iterator[Unit]:
    """All units of a source, train's entries and then val's; UserError where an entry cannot be opened."""
    entries, split_of = source.entries, source.entry_splits
    group: list[Span] = []
    held = 0
    for i, entry in enumerate(entries):
        small_one = isinstance(entry, Span) and entry.stop - entry.start <= LONG
        border = i > 0 and split_of[i] != split_of[i - 1]
        if group and (not small_one or border or held >= UNIT or len(group) >= DOCUMENTS):
            yield Files(i - len(group), spans=tuple(group))
            group, held = [], 0
        if small_one and isinstance(entry, Span):
            group.append(entry)
            held += entry.stop - entry.start
        else:
            yield from _of_entry(i, entry, source)
    if group:
        yield Files(len(entries) - len(group), spans=tuple(group))


def _of_entry(number: int, entry: Entry, source: Source) -> Iterator[Unit]:
    """The units of a long text, of a file of records, or of a stream."""
    if isinstance(entry, Span):
        digest, bad = _survey(entry, source)
        spans = cut_span(entry, UNIT)
        last = len(spans) - 1
        for i, span in enumerate(spans):
            yield Files(number, i == 0, i == last, digest if i == 0 else None, bad, (span,))
    elif isinstance(entry, Remote):
        from ssmtrain.data.hub import stream

        yield from _of_texts(number, entry.path, stream(entry))
    elif entry.format == "parquet":
        from ssmtrain.data.parquet import column

        yield from _of_texts(number, f"{entry.file.key}: {entry.file.path}", column(entry.file, entry.key))
    elif entry.format == "jsonl" and entry.packing is None:
        for start in range(0, entry.file.size, UNIT):
            stop = min(start + UNIT, entry.file.size)
            yield Lines(number, records=entry, start=start, stop=stop)
    elif entry.format == "jsonl":
        line = 1
        with _open(entry) as file:
            for data in jsonl.blocks(file, entry.file, UNIT):
                yield Block(number, records=entry, data=data, line=line)
                line += data.count(b"\n")
            entry.file.check(file)
    else:
        yield from _of_packed_text(number, entry, source)


def _of_texts(number: int, name: str, texts: Iterable[str | bytes | None]) -> Iterator[Unit]:
    """A table's texts, about `UNIT` bytes at a time."""
    held: list[str | bytes | None] = []
    size, first = 0, 1
    for text in texts:
        held.append(text)
        size += len(text) if isinstance(text, str | bytes) else 0
        if size >= UNIT or len(held) >= DOCUMENTS:
            yield Texts(number, name=name, number=first, texts=held)
            first, held, size = first + len(held), [], 0
    if held:
        yield Texts(number, name=name, number=first, texts=held)


def _of_packed_text(number: int, entry: Records, source: Source) -> Iterator[Unit]:
    """One document that is unpacked, eight pieces at a time; it may prove long."""
    digest, bad = _survey(entry, source)
    held: list[str | bytes | None] = []
    opens = True

    def part(closes: bool) -> Texts:
        first = digest if opens else None
        return Texts(number, opens, closes, first, bad, name="", number=0, texts=held)

    with _open(entry) as file:
        for piece in cut_text(file, entry.file, 0, None) if not bad else ():
            if len(held) == 8:
                yield part(closes=False)
                held, opens = [], False
            held.append(piece)
        entry.file.check(file)
    yield part(closes=True)


def _survey(entry: Span | Records, source: Source) -> tuple[bytes | None, bool]:
    """What must be known of a long text before its first part is written: its digest; whether it is none."""
    if not (source.skip_bad or source.drop_duplicates):
        return None, False
    digest = hashlib.blake2b(digest_size=16)
    try:
        if isinstance(entry, Span):
            for piece in pieces(entry):
                digest.update(piece.encode())
        else:
            with _open(entry) as file:
                for piece in cut_text(file, entry.file, 0, None):
                    digest.update(piece.encode())
    except BadText:
        if not source.skip_bad:
            raise
        return None, True
    return (digest.digest() if source.drop_duplicates else None), False


def _open(entry: Records) -> BinaryIO:
    return open_packed(entry.file, entry.packing) if entry.packing else entry.file.open()
