"""`ssmtrain data show --find`: at which steps a file, or a text, is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.data.module import Data, open_data
from ssmtrain.data.tokenizer import load_tokenizer
from ssmtrain.explain.documents import Documents
from ssmtrain.explain.rows import escaped
from ssmtrain.explain.subject import Subject

SHOWN = 20
"""Steps that are printed without --full."""
AT_A_TIME = 2**18
"""Sample numbers that are looked up at once."""


@dataclass(frozen=True)
class Hit:
    """A row of a step that holds what was looked for."""

    step: int
    index: int
    """The row's place in the step."""
    row: int
    """Its place in the split's file order."""
    document: int
    file: str | None


def find(request: Request, subject: Subject) -> int:
    """Print the steps that read the file or text of --find."""
    text = request.flags["find"]
    tokenizer = load_tokenizer(subject.config.tokenizer)
    data = open_data(subject.config, tokenizer)
    documents = Documents(subject.config, data, tokenizer)
    rows = rows_that_hold(text, documents)
    full = request.as_json or bool(request.flags.get("full"))
    found = list(islice(steps(subject, data, rows), None if full else SHOWN + 1))
    if request.as_json:
        hits = [hit.__dict__ | {"read": hit.step <= subject.done} for hit in found]
        print(json.dumps({"find": text, "rows": sorted(rows), "steps": hits}, indent=2))
        return FINISHED
    print(
        f"{escaped(text)}: {len(rows):,} rows of the training split; {subject.name} of {subject.last:,} steps"
    )
    for hit in found[: None if full else SHOWN]:
        when = "read at" if hit.step <= subject.done else "to be read at"
        where = f", {escaped(hit.file)}" if hit.file else ""
        print(f"  {when} step {hit.step:,}, row {hit.index} (row {hit.row:,} of the split{where})")
    if not found:
        print("  none of them is read: the run is shorter than an epoch")
    elif len(found) > SHOWN and not full:
        print("  … and later ones: --full for all")
    return FINISHED


def rows_that_hold(text: str, documents: Documents) -> dict[int, tuple[int, str | None]]:
    """Rows by file order -> (document, file) of a file's name, else of a text; UserError for none."""
    if not text:
        raise UserError("--find needs a text or a file's name")
    found: dict[int, tuple[int, str | None]] = {}
    for number in documents.named(text):
        for row in documents.rows_of(number):
            found.setdefault(row, (number, documents.file(number)))
    if not found:
        found = {row: (place.document, place.file) for row, place in documents.places_of(text)}
    if not found:
        raise UserError(
            f"--find={text[:60]}: no file of the training split has this name, and no row this text",
            "it may be in the validation split; a text is looked for as it stands, case and line ends too",
        )
    return found


def steps(subject: Subject, data: Data, rows: dict[int, tuple[int, str | None]]) -> Iterator[Hit]:
    """The steps of the run that read some rows, in order."""
    wanted = np.array(sorted(rows), np.int64)
    since, before = subject.begin
    end = before + (max(subject.last, subject.done) - since) * subject.rows_per_step
    for low in range(before, end, AT_A_TIME):
        order = data.train.samples(range(low, min(low + AT_A_TIME, end)))
        for at in np.flatnonzero(np.isin(order, wanted)).tolist():
            step, index = divmod(low + at - before, subject.rows_per_step)
            row = int(order[at])
            yield Hit(since + step + 1, index, row, *rows[row])
