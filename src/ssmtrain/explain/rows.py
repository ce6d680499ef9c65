"""A step's rows as plain data: source, documents, masks and text of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ssmtrain.config.errors import UserError
from ssmtrain.data.batch import Batch, cut
from ssmtrain.data.module import Data
from ssmtrain.data.pack import IGNORE
from ssmtrain.explain.asked import Asked, asked
from ssmtrain.explain.documents import Documents, Place
from ssmtrain.explain.reads import Reads, row_of


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
    source: str
    """Which of a mixture's; empty where there is one alone."""
    row: int
    """Its place in the file order of the split; of a task its number."""
    begin: int
    """Which token of that row is its first: above 0 where rows are cut to the length of the step."""
    labels: int
    """Positions that have something to predict."""
    ignored: list[tuple[int, str]]
    """Positions of a text that have none, and why."""
    padding: int
    """Positions after the end of the split."""
    parts: list[Part]
    task: Asked | None = None
    """What a task asks; it has no parts."""
    goes_on: bool = False
    """Whether its first document goes on with the states in which the row before of its slot ended."""

    def plain(self, full: bool) -> dict[str, Any]:
        """For JSON; token ids of texts only where asked for."""
        found = asdict(self)
        for part in found["parts"] if not full else ():
            del part["ids"]
        return found


def rows_of(data: Data, reads: Reads, numbers: Sequence[int], length: int) -> list[Row]:
    """The rows of some sample numbers, as a step with rows of this length is given them."""
    if not numbers:
        return []
    batch, rows = cut(data.train.batch(numbers), length), []
    pieces = data.train.seq_len // length
    for i in range(len(batch.inputs)):
        whole, piece = divmod(i, pieces)
        name, row = row_of(data.train, batch.sample_ids[whole])
        part = reads.parts[name]
        if isinstance(part, Documents):
            rows.append(_of_text(batch, i, name, row, piece * length, part))
        else:
            found = asked(part, batch, i)
            rows.append(Row(i, name, row, 0, len(found.answers), [], 0, [], found))
    return rows


def _of_text(batch: Batch, index: int, name: str, row: int, begin: int, documents: Documents) -> Row:
    inputs, labels = batch.inputs[index].numpy(), batch.labels[index].numpy()  # (l,)
    length, left = len(inputs), documents.stream.tokens - row * documents.seq_len  # of the split
    real = max(0, min(length, left - begin))  # the rest is padding
    opens = [0]
    if batch.doc_ids is not None:
        opens += (1 + np.flatnonzero(np.diff(batch.doc_ids[index].numpy()))).tolist()
    ignored = []
    for at in np.flatnonzero(labels[:real] == IGNORE).tolist():
        if begin + at + 1 >= left:
            ignored.append((at, "the split ends"))
        else:
            at_end = begin + at + 1 == documents.seq_len
            ignored.append((at, f"the next {'row' if at_end else 'token'} starts a document"))
    parts = []
    for first, stop in zip(opens, [*opens[1:], length], strict=True):
        ids = inputs[first : min(stop, real)].tolist()
        if ids:
            ends = ids[-1] == documents.tokenizer.eot
            text = documents.tokenizer.decode(ids[:-1] if ends else ids)
            last = first + len(ids) - 1
            parts.append(Part(first, last, documents.place(row, begin + first), ids, text, ends))
    count, goes_on = int((labels != IGNORE).sum()), batch.goes_on is not None and batch.goes_on[index]
    return Row(index, name, row, begin, count, ignored, length - real, parts, goes_on=goes_on)


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
    lines = [f"row {row.index} ({where(row)}): {row.labels:,} labels" + _masks(row)]
    for part in row.parts:
        place = part.place
        at = f"document {place.document:,}"
        if place.file is not None:
            at = f"{escaped(place.file)}, {at}"
        whole = "from its start" if place.token == 0 else f"from its token {place.token:,}"
        states = ", with the states of the row before" if row.goes_on and part.first == 0 else ""
        about = "" if place.exact else "about "
        byte = "" if place.byte is None else f", {about}byte {place.byte:,} of the file"
        lines.append(f"  {f'{part.first}-{part.last}':<11} {at}, {whole} of {place.tokens:,}{byte}{states}")
        lines.append(f"  {'':<11} {shortened(part.text, limit)}{' <end of text>' if part.ends else ''}")
    if row.task is not None:
        lines.append(f"  {f'0-{len(row.task.ids) - 1}':<11} {row.task.tokens(limit)}")
        lines.append(f"  {'asked':<11} {row.task.said(limit)}")
    return lines


def where(row: Row) -> str:
    """What a row is, of which source."""
    of = f" {row.source}" if row.source else ""
    if row.task is not None:
        return f"row {row.row:,} of{of or ' the task'}, {row.task.kind} with seed {row.task.seed}"
    cut_off = f"from token {row.begin:,} of " if row.begin else ""
    return f"{cut_off}row {row.row:,} of{of or ' the split'}"


def _masks(row: Row) -> str:
    said = [f"none at {at} ({why})" for at, why in row.ignored[:4]]
    said += [f"and at {len(row.ignored) - 4} more"] if len(row.ignored) > 4 else []
    said += [f"{row.padding} positions of padding"] if row.padding else []
    return "".join(f", {text}" for text in said)
