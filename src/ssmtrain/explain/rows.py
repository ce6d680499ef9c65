"""A step's rows as plain data: documents, masks and text of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ssmtrain.config.errors import UserError
from ssmtrain.data.module import Batch, Data
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tokenizer import Tokenizer
from ssmtrain.explain.documents import Documents, Place


@dataclass(frozen=True)
class Part:
    """The tokens of one document in a row: no other part's tokens see them."""

    first: int
    """Position of its first token in the row."""
    last: int
    place: Place
    ids: list[int]
    text: str
    """Its tokens decoded, the end-of-text token left out."""
    ends: bool
    """Whether its end-of-text token is in the row."""


@dataclass(frozen=True)
class Row:
    """One row of a step."""

    index: int
    """Its place in the step, from 0."""
    row: int
    """Its place in the split's file order."""
    labels: int
    """Positions that have something to predict."""
    ignored: list[tuple[int, str]]
    """Positions that have none, and why."""
    padding: int
    """Positions after the end of the split."""
    parts: list[Part]

    def plain(self, full: bool) -> dict[str, Any]:
        """For JSON; token ids only where asked for."""
        found = asdict(self)
        for part in found["parts"] if not full else ():
            del part["ids"]
        return found


def rows_of(data: Data, documents: Documents, tokenizer: Tokenizer, numbers: Sequence[int]) -> list[Row]:
    """The rows of some sample numbers, as the step is given them."""
    batch = data.train.batch(numbers)
    return [_row(batch, i, documents, tokenizer) for i in range(len(batch.sample_ids))]


def _row(batch: Batch, index: int, documents: Documents, tokenizer: Tokenizer) -> Row:
    row, inputs = batch.sample_ids[index], batch.inputs[index].numpy()  # (L,)
    labels, L = batch.labels[index].numpy(), batch.inputs.shape[1]
    real = int(min(L, documents.stream.tokens - row * L))  # the rest is padding
    opens = [0]
    if batch.doc_ids is not None:
        opens += (1 + np.flatnonzero(np.diff(batch.doc_ids[index].numpy()))).tolist()
    ignored = []
    for at in np.flatnonzero(labels == IGNORE).tolist():
        if at + 1 < real:
            ignored.append((at, "the next token starts a document"))
        elif at < real:
            over = row * L + real >= documents.stream.tokens
            ignored.append((at, "the split ends" if over else "the next row starts a document"))
    parts = []
    for first, stop in zip(opens, [*opens[1:], L], strict=True):
        ids = inputs[first : min(stop, real)].tolist()
        if ids:
            ends = ids[-1] == tokenizer.eot
            text = tokenizer.decode(ids[:-1] if ends else ids)
            last = first + len(ids) - 1
            parts.append(Part(first, last, documents.place(row, first), ids, text, ends))
    return Row(index, row, int((labels != IGNORE).sum()), ignored, L - real, parts)


def chosen(text: str | None, count: int) -> list[int]:
    """The rows of a step that `rows=` names: 3, or 0,3, or 2:5 (5 excluded); UserError for others."""
    if text is None:
        return list(range(count))
    found: list[int] = []
    for word in text.split(","):
        low, colon, high = word.partition(":")
        numbers = [low or "0", (high or str(count)) if colon else low]
        if not all(number.isdecimal() for number in numbers):
            raise UserError(f"rows={text}: expected rows of the step, as in rows=3, rows=0,3 or rows=2:5")
        begin, stop = int(numbers[0]), int(numbers[1]) + (not colon)
        if begin >= stop or stop > count:
            raise UserError(f"rows={text}: the step has rows 0 to {count - 1}")
        found += range(begin, stop)
    return found


def escaped(text: str) -> str:
    """The text on one line; what a terminal would obey, or nobody would see, as Python writes it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shortened(text: str, limit: int | None) -> str:
    """The text escaped and quoted, its middle left out where it is longer than the limit."""
    if limit is not None and len(text) > limit:
        half = limit // 2
        return f'"{escaped(text[:half])} … {escaped(text[-half:])}" ({len(text):,} characters)'
    return f'"{escaped(text)}"'


def described(row: Row, limit: int | None) -> list[str]:
    """A row for a reader."""
    lines = [f"row {row.index} (row {row.row:,} of the split): {row.labels:,} labels" + _masks(row)]
    for part in row.parts:
        place = part.place
        where = f"document {place.document:,}"
        if place.file is not None:
            where = f"{escaped(place.file)}, {where}"
        whole = "from its start" if place.token == 0 else f"from its token {place.token:,}"
        about = "" if place.exact else "about "
        byte = "" if place.byte is None else f", {about}byte {place.byte:,} of the file"
        lines.append(f"  {f'{part.first}-{part.last}':<11} {where}, {whole} of {place.tokens:,}{byte}")
        lines.append(f"  {'':<11} {shortened(part.text, limit)}{' <end of text>' if part.ends else ''}")
    return lines


def _masks(row: Row) -> str:
    said = [f"none at {at} ({why})" for at, why in row.ignored[:4]]
    said += [f"and at {len(row.ignored) - 4} more"] if len(row.ignored) > 4 else []
    said += [f"{row.padding} positions of padding"] if row.padding else []
    return "".join(f", {text}" for text in said)
