"""Documents as spans of bytes in files, read in pieces of checked text."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources.abc import Traversable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ssmtrain.config.errors import UserError

PIECE = 2**20
"""Bytes of text handed to the tokenizer at a time; a longer document is cut where words end."""
# Where a text may be cut without a pre-tokenizer noticing: after a lone line's end, else before a lone space.
LINE = re.compile(rb"\S\n(?=\S)")
SPACE = re.compile(rb"\S(?= \S)")
PACKED = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "Parquet",
}
"""First bytes of what is no text. Archives are never opened, so that none can write outside itself."""


class BadText(UserError):
    """A file that is not plain UTF-8 text."""


@dataclass(frozen=True)
class Member:
    """A novel of the embedded corpus, compressed inside the package."""

    path: Traversable
    size: int
    sha256: str

    def open(self) -> BinaryIO:
        """The text, verified."""
        try:
            text = lzma.decompress(self.path.read_bytes())
        except (OSError, lzma.LZMAError):
            text = b""
        if hashlib.sha256(text).hexdigest() != self.sha256:
            raise UserError(f"{self.path} is damaged: install ssmtrain again")
        return BytesIO(text)

    def check(self, file: BinaryIO) -> None:
        """Nothing can change it."""


@dataclass(frozen=True)
class TextFile:
    """A text file as it was when it was found."""

    path: Path
    size: int
    changed: tuple[int, int]
    """Times of the last change of content and of inode, in nanoseconds."""
    key: str
    """The config key that named it."""

    def open(self) -> BinaryIO:
        """The file; UserError when it cannot be read."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"{self.key}: cannot read {self.path}: {error.strerror}") from None
        self.check(file)
        return file

    def handle(self) -> int:
        """A descriptor of the file; UserError when it cannot be read."""
        try:
            return os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.key}: cannot read {self.path}: {error.strerror}") from None

    def check(self, file: BinaryIO) -> None:
        """UserError when the file is no longer what was found."""
        self.compare(os.fstat(file.fileno()))

    def compare(self, now: os.stat_result) -> None:
        """The same of what the system says of it."""
        if (now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (self.size, *self.changed):
            raise UserError(f"{self.key}: {self.path} changed while it was read", "run again when it rests")


class Span(NamedTuple):
    """Bytes [start, stop) of a file: one document."""

    file: Member | TextFile
    start: int
    stop: int


class Records(NamedTuple):
    """A file of documents of unknown number, or a packed text: read from its beginning to its end."""

    file: TextFile
    format: str
    """text, jsonl or parquet."""
    packing: str | None
    """gz, xz, zst, or none."""
    key: str
    """The field or column that holds the text."""


class Remote(NamedTuple):
    """A split of a data set that the datasets library streams."""

    path: str
    subset: str | None
    revision: str | None
    split: str
    key: str


Entry = Span | Records | Remote


@dataclass(frozen=True)
class Source:
    """The documents of each split, in order, and what identifies them."""

    label: str
    """Short name for folders and reports."""
    splits: dict[str, list[Entry]]
    """train first, and val, or val.<name> for each validation set."""
    fingerprint: dict[str, Any] = field(repr=False)
    """Plain JSON that changes when the text may have changed."""
    held_out: float | None = None
    """Share of the training split's records that validate instead, evenly spaced; absent: none."""
    skip_bad: bool = False
    """Leave out what cannot be read as text."""
    drop_duplicates: bool = False
    """Leave out documents that came before."""

    @cached_property
    def entries(self) -> list[Entry]:
        """Those of all splits, one after the other."""
        return [entry for part in self.splits.values() for entry in part]

    @cached_property
    def entry_splits(self) -> list[str]:
        """The split of each entry."""
        return [split for split, part in self.splits.items() for _ in part]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the fingerprint."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()


def pieces(span: Span) -> Iterator[str]:
    """The text of a document, in pieces of at most `PIECE` bytes; BadText names file and offset."""
    with span.file.open() as file:
        file.seek(span.start)
        yield from cut_text(file, span.file, span.start, span.stop)
        span.file.check(file)


def small(span: Span) -> str:
    """The text of a plain file that is one piece, with fewer calls of the system than `pieces`."""
    if span.stop - span.start > PIECE or not isinstance(span.file, TextFile):
        return "".join(pieces(span))
    handle = span.file.handle()
    try:
        data = os.pread(handle, span.stop - span.start, span.start)
        span.file.compare(os.fstat(handle))
    finally:
        os.close(handle)
    return text_of(data, span.file, span.start)


def cut_text(file: BinaryIO, name: Member | TextFile, at: int, stop: int | None) -> Iterator[str]:
    """What is left of a stream that stands at offset `at`, up to `stop` or its end, in pieces of text."""
    held = b""
    while True:
        room = PIECE + 1 - len(held)
        more = file.read(room if stop is None else min(room, stop - at - len(held)))
        held += more
        if more and len(held) <= PIECE:
            continue
        cut = len(held) if len(held) <= PIECE else find_cut(held[:PIECE])
        if held:
            yield text_of(held[:cut], name, at)
        at, held = at + cut, held[cut:]
        if not more and not held:
            return


def cut_span(span: Span, size: int) -> list[Span]:
    """A span as spans of at most `size` bytes, cut where pieces may be."""
    out = []
    with span.file.open() as file:
        while span.stop - span.start > size:
            look = min(PIECE, size)
            file.seek(span.start + size - look)
            cut = span.start + size - look + find_cut(file.read(look))
            out.append(span._replace(stop=cut))
            span = span._replace(start=cut)
    return [*out, span]


def more_problems(spans: Sequence[Entry], limit: int, bytes_limit: int = 2**28) -> list[str]:
    """One line for each further plain file that is not UTF-8 text, up to `limit`, soon found."""
    found: list[str] = []
    for span in spans:
        if not isinstance(span, Span):
            continue
        bytes_limit -= span.stop - span.start
        if len(found) == limit or bytes_limit < 0:
            break
        try:
            for _ in pieces(span):
                pass
        except UserError as error:
            found.append(error.lines[0])
    return found


def find_cut(held: bytes) -> int:
    """Where to end a piece: the last line's end, else space, else character of `held`."""
    for pattern in (LINE, SPACE):
        for tail in (2**14, len(held)):  # the last match is nearly always near the end
            base = len(held) - min(tail, len(held))
            ends = [m.end() for m in pattern.finditer(held, base)]
            if ends:
                return ends[-1]
    end = len(held) - 1
    while end > 0 and held[end] & 0xC0 == 0x80:  # a continuation byte: step back to its character's start
        end -= 1
    return end or len(held)


def text_of(data: bytes, file: Member | TextFile, at: int) -> str:
    """The bytes at offset `at` of a file as text; BadText says why they are none."""
    bad = [data.find(b"\0")] if b"\0" in data else []
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad.append(error.start)
    if not bad:
        return text
    offset = min(bad)
    kind = next((k for magic, k in PACKED.items() if at == 0 and data.startswith(magic)), None)
    if at == 0 and data[257:262] == b"ustar":
        kind = "tar"
    byte = "a NUL byte" if data[offset] == 0 else f"byte {data[offset]:#04x} is not UTF-8"
    why = f"this is {kind} data, not text" if kind else f"{byte}: this is not plain text"
    raise BadText(f"{getattr(file, 'key', 'data')}: {file.path}:{at + offset}: {why}")
