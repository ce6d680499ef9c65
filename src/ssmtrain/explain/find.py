"""`ssmtrain data show --find`: at which steps a file, a text, or a row of a task is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.data.module import Data
from ssmtrain.data.tasks.rows import TaskRows
from ssmtrain.explain.documents import Documents
from ssmtrain.explain.reads import Reads, row_of
from ssmtrain.explain.rows import escaped
from ssmtrain.explain.subject import Subject

SHOWN = 20
"""Steps that are printed without --full."""
AT_A_TIME = 2**18
"""Sample numbers that are looked up at once."""


@dataclass(frozen=True, slots=True)
class Found:
    """Where in a row of a source it stands."""

    first: int
    stop: int
    """Positions [first, stop) of the row."""
    document: int | None
    """None for a task, whose rows are no documents."""
    file: str | None


@dataclass(frozen=True)
class Hit:
    """A row of a step that holds what was looked for."""

    step: int
    index: int
    """The row's place in the step."""
    source: str
    """Which of a mixture's; empty where there is one alone."""
    row: int
    """Its place in the split's file order; of a task its number."""
    document: int | None
    file: str | None


def find(request: Request, subject: Subject, data: Data, reads: Reads) -> int:
    """Print the steps that read the file, text or row of --find, of one source where source= names it."""
    text = request.flags["find"]
    rows = rows_that_hold(text, reads, reads.chosen(request.words.get("source")))
    full = request.as_json or bool(request.flags.get("full"))
    found = list(islice(steps(subject, data, rows), None if full else SHOWN + 1))
    if request.as_json:
        hits = [hit.__dict__ | {"read": hit.step <= subject.done} for hit in found]
        print(json.dumps({"find": text, "rows": data.train.names(sorted(rows)), "steps": hits}, indent=2))
        return FINISHED
    many = "1 row" if len(rows) == 1 else f"{len(rows):,} rows"
    print(f"{escaped(text)}: {many} to train on; {subject.name} of {subject.last:,} steps")
    for hit in found[: None if full else SHOWN]:
        when = "read at" if hit.step <= subject.done else "to be read at"
        at = f", {escaped(hit.file)}" if hit.file else ""
        of = hit.source or ("the task" if hit.document is None else "the split")
        print(f"  {when} step {hit.step:,}, row {hit.index} (row {hit.row:,} of {of}{at})")
    if not found:
        print("  none of them is read by its end")
    elif len(found) > SHOWN and not full:
        print("  … and later ones: --full for all")
    return FINISHED


def rows_that_hold(text: str, reads: Reads, names: list[str]) -> dict[int, list[Found]]:
    """Sample ids of the rows with a file of that name, else with that text; of a task the row of that number.

    UserError where there is none in the sources of these names.
    """
    if not text:
        raise UserError("--find needs a text or a file's name")
    parts = {name: reads.parts[name] for name in names}
    texts = {name: part for name, part in parts.items() if isinstance(part, Documents)}
    found: dict[int, list[Found]] = {}
    for name, part in texts.items():
        for number in part.named(text):
            for row, first, stop in part.rows_of(number):
                here = Found(first, stop, number, part.file(number))
                found.setdefault(reads.id(name, row), []).append(here)
    for name, part in texts.items() if not found else ():
        for row, at in part.places_of(text):
            place = part.place(row, at)
            found[reads.id(name, row)] = [Found(at, at + 1, place.document, place.file)]
    for name, task in parts.items():
        if isinstance(task, TaskRows) and text.isdecimal() and int(text) < task.per_epoch:
            found[reads.id(name, int(text))] = [Found(0, task.seq_len, None, None)]
    if found:
        return found
    if not texts:
        raise UserError(
            f"--find={text[:60]}: the rows of a task are numbers, in which no text is looked for",
            "give the number of a row, as in --find 1203",
        )
    where = f"the training split{f' of {names[0]}' if len(names) == 1 and names[0] else ''}"
    raise UserError(
        f"--find={text[:60]}: no file of {where} has this name, and no row this text",
        "it may be in the validation split; a text is looked for as it stands, case and line ends too",
    )


def steps(subject: Subject, data: Data, rows: dict[int, list[Found]]) -> Iterator[Hit]:
    """The rows of the run's steps that hold what was found, in order, through epochs and phases."""
    wanted, whole = np.array(sorted(rows), np.int64), data.train.seq_len
    for stretch in subject.stretches:
        end = stretch.first + stretch.steps * stretch.rows
        for low in range(stretch.first, end, AT_A_TIME):
            order = data.train.samples(range(low, min(low + AT_A_TIME, end)))
            for at in np.flatnonzero(np.isin(order, wanted)).tolist():
                step, index = divmod(low + at - stretch.first, stretch.rows)
                step, sample = stretch.before + step + 1, int(order[at])
                name, row = row_of(data.train, sample)
                length = subject.length(step, stretch)
                for piece in range(whole // length):
                    begin, stop = piece * length, (piece + 1) * length
                    here = [one for one in rows[sample] if one.first < stop and one.stop > begin]
                    if here:
                        place = index * (whole // length) + piece
                        yield Hit(step, place, name, row, here[0].document, here[0].file)
