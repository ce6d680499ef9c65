"""`ssmtrain data show`: what a step reads, before the run exists, while it trains or afterwards."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.data.mixture import Mixture
from ssmtrain.data.module import Data, open_data
from ssmtrain.data.tokenizer import tokenizer_of
from ssmtrain.explain.find import find
from ssmtrain.explain.reads import Reads
from ssmtrain.explain.rows import chosen, described, rows_of
from ssmtrain.explain.subject import Subject, open_subject, records, step_of

SHOWN = 8
"""Rows that are printed where neither rows= nor --full asks for others."""
LIMIT = 240
"""Characters of a document's part that are printed without --full."""


def command(request: Request) -> int:
    """Print the rows of step=N, or with --find the steps that read a document."""
    subject = open_subject(request)
    finding = "find" in request.flags
    beside = [word for word in request.words if finding and word != "source"]
    if beside:
        raise UserError(f"{beside[0]}= says nothing beside --find: give one of them")
    step = 0 if finding else step_of(request)
    numbers = range(0) if finding else subject.numbers(step)
    tokenizer = tokenizer_of(subject.config, subject.folder)
    data = open_data(subject.config, tokenizer)
    reads = Reads(data, tokenizer)
    if finding:
        return find(request, subject, data, reads)
    rows = rows_of(data, reads, numbers, subject.length(step))
    wanted = chosen(request.words.get("rows"), len(rows))
    names = reads.chosen(request.words.get("source"))
    wanted = [i for i in wanted if rows[i].source in names]
    full = bool(request.flags.get("full"))
    about = summary(subject, step, numbers, data)
    hidden = 0
    if not (request.as_json or full or "rows" in request.words):
        hidden = len(wanted) - len(wanted[:SHOWN])
        wanted = wanted[:SHOWN]
    rows = [rows[i] for i in wanted]
    if request.as_json:
        print(json.dumps({**about, "rows": [row.plain(full) for row in rows]}, indent=2))
        return FINISHED
    print("\n".join(headline(about)))
    for row in rows:
        print("\n".join(["", *described(row, None if full else LIMIT)]))
    if not rows:
        print(f"\nnone of them is of {names[0]}")
    if hidden and "source" in request.words:
        print(f"\n… and {hidden} more rows of {names[0]}: --full for all")
    elif hidden:
        print(f"\n… and {hidden} more rows: rows={SHOWN}:{SHOWN + min(SHOWN, hidden)}, or --full for all")
    return FINISHED


def summary(subject: Subject, step: int, numbers: range, data: Data) -> dict[str, Any]:
    """What is known of the step, as plain data."""
    found: dict[str, Any] = {
        "name": subject.name,
        "step": step,
        "last_step": subject.last,
        "taken": step <= subject.done,
        "samples": [numbers.start, numbers.stop],
        "seq_len": subject.length(step),
        "row": subject.config.data.seq_len,
    }
    if isinstance(data.train, Mixture):
        found["sources"] = shares(data.train, numbers)
    else:
        found["epochs"] = _epochs(np.asarray(numbers), data.train.per_epoch)
    return found | (figures(subject, step) if subject.folder else {})


def shares(mixture: Mixture, numbers: range) -> dict[str, dict[str, Any]]:
    """What each source gives to some sample numbers: rows, in which of its epochs, its share."""
    which, own = mixture.at(numbers)
    weights = mixture.shares(numbers.start)
    found = {}
    for i, (name, source) in enumerate(mixture.sources.items()):
        mine = own[which == i]
        epochs = _epochs(mine, source.per_epoch)
        found[name] = {"rows": len(mine), "epochs": epochs, "share": weights[name]}
    return found


def _epochs(numbers: np.ndarray, per_epoch: int) -> list[int]:
    return sorted({int(epoch) + 1 for epoch in numbers // per_epoch})


def figures(subject: Subject, step: int) -> dict[str, Any]:
    """The step's loss as the run recorded it: its own, or the mean of the steps around it."""
    assert subject.folder is not None
    for line in records(subject.folder / "ledger.jsonl"):
        if line["step"] == step:
            loss, norm = (float.fromhex(line[key]) for key in ("loss_hex", "grad_norm_hex"))
            return {"loss": loss, "loss_of": [step, step], "grad_norm": norm}
    before = subject.begin.step
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
    lines = [f"{about['name']}, step {about['step']:,} of {about['last_step']:,} ({when})"]
    if about.get("loss") is not None:
        low, high = about["loss_of"]
        of = "of this step" if low == high else f"the mean of steps {low:,} to {high:,}"
        norm = f", gradient norm {about['grad_norm']:.4g}" if about.get("grad_norm") is not None else ""
        lines.append(f"loss {about['loss']:.4f} ({of}){norm}")
    rows = f"{stop - first} row{'s' * (stop - first > 1)} of {about['row']:,} tokens"
    pieces = about["row"] // about["seq_len"]
    if pieces > 1:
        rows += f", cut into {(stop - first) * pieces} of {about['seq_len']:,}"
    epoch = f", epoch {_and(about['epochs'])}" if "epochs" in about else ""
    lines.append(f"{rows}: samples {first:,} to {stop - 1:,}{epoch}")
    for name, one in about.get("sources", {}).items():
        when = f" in its epoch {_and(one['epochs'])}" if one["rows"] else ""
        many = "1 row" if one["rows"] == 1 else f"{one['rows']:,} rows"
        lines.append(f"  {name}: {many}{when}, {one['share']:.1%} by weight")
    return lines


def _and(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))
