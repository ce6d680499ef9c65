"""`ssmtrain data show`: what a step reads, before the run exists, while it trains or afterwards."""

from __future__ import annotations

import json
from typing import Any

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.data.module import open_data
from ssmtrain.data.tokenizer import load_tokenizer
from ssmtrain.explain.documents import Documents
from ssmtrain.explain.find import find
from ssmtrain.explain.rows import chosen, described, rows_of
from ssmtrain.explain.subject import Subject, open_subject, records, step_of

SHOWN = 8
"""Rows that are printed where neither rows= nor --full asks for others."""
LIMIT = 240
"""Characters of a document's part that are printed without --full."""


def command(request: Request) -> int:
    """Print the rows of step=N, or with --find the steps that read a document."""
    subject = open_subject(request)
    if "find" in request.flags:
        if request.words:
            raise UserError(f"{next(iter(request.words))}= says nothing beside --find: give one of them")
        return find(request, subject)
    step = step_of(request)
    numbers = subject.numbers(step)
    wanted = chosen(request.words.get("rows"), len(numbers))
    full = bool(request.flags.get("full"))
    tokenizer = load_tokenizer(subject.config.tokenizer)
    data = open_data(subject.config, tokenizer)
    documents = Documents(subject.config, data, tokenizer)
    about = summary(subject, step, numbers, data.train.per_epoch)
    hidden = 0
    if not (request.as_json or full or "rows" in request.words):
        hidden = len(wanted) - len(wanted[:SHOWN])
        wanted = wanted[:SHOWN]
    rows = rows_of(data, documents, tokenizer, numbers)
    rows = [rows[i] for i in wanted]
    if request.as_json:
        print(json.dumps({**about, "rows": [row.plain(full) for row in rows]}, indent=2))
        return FINISHED
    print("\n".join(headline(about)))
    for row in rows:
        print("\n".join(["", *described(row, None if full else LIMIT)]))
    if hidden:
        print(f"\n… and {hidden} more rows: rows={SHOWN}:{SHOWN + min(SHOWN, hidden)}, or --full for all")
    return FINISHED


def summary(subject: Subject, step: int, numbers: range, per_epoch: int) -> dict[str, Any]:
    """What is known of the step, as plain data."""
    found: dict[str, Any] = {
        "name": subject.name,
        "step": step,
        "last_step": subject.last,
        "taken": step <= subject.done,
        "samples": [numbers.start, numbers.stop],
        "epochs": sorted({numbers.start // per_epoch + 1, (numbers.stop - 1) // per_epoch + 1}),
        "seq_len": subject.config.data.seq_len,
    }
    return found | (figures(subject, step) if subject.folder else {})


def figures(subject: Subject, step: int) -> dict[str, Any]:
    """The step's loss as the run recorded it: its own, or the mean of the steps around it."""
    assert subject.folder is not None
    for line in records(subject.folder / "ledger.jsonl"):
        if line["step"] == step:
            loss, norm = (float.fromhex(line[key]) for key in ("loss_hex", "grad_norm_hex"))
            return {"loss": loss, "loss_of": [step, step], "grad_norm": norm}
    before = subject.begin[0]
    for record in records(subject.folder / "metrics.jsonl", "train"):
        if record["step"] >= step:
            own = {"grad_norm": record["grad_norm"]} if record["step"] == step else {}
            return {"loss": record["loss"], "loss_of": [before + 1, record["step"]], **own}
        before = record["step"]
    return {}


def headline(about: dict[str, Any]) -> list[str]:
    """The summary as lines."""
    first, stop = about["samples"]
    when = "taken" if about["taken"] else "not taken yet"
    epochs = " and ".join(str(epoch) for epoch in about["epochs"])
    lines = [f"{about['name']}, step {about['step']:,} of {about['last_step']:,} ({when})"]
    if about.get("loss") is not None:
        low, high = about["loss_of"]
        of = "of this step" if low == high else f"the mean of steps {low:,} to {high:,}"
        norm = f", gradient norm {about['grad_norm']:.4g}" if about.get("grad_norm") is not None else ""
        lines.append(f"loss {about['loss']:.4f} ({of}){norm}")
    rows = f"{stop - first} rows of {about['seq_len']:,} tokens"
    return [*lines, f"{rows}: samples {first:,} to {stop - 1:,}, epoch {epochs}"]
