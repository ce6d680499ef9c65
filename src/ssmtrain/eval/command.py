"""The verb eval: score a trained run on a split of its data or on a text file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint.reading import open_trained
from ssmtrain.checkpoint.weights import load_model
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.config.task_rules import TASKS
from ssmtrain.data.module import Data, Numbered, Rows, open_data, text_rows
from ssmtrain.data.tasks.source import training_rows
from ssmtrain.data.tokenizer import Tokenizer, tokenizer_of
from ssmtrain.eval.evaluate import Score, evaluate
from ssmtrain.eval.texts import read_text

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Scored:
    """What is scored."""

    rows: Numbered
    tokens: int
    bytes: int
    """0 for a task, which is no text."""
    name: str
    lengths: dict[int, Numbered]
    """A task's rows of other lengths."""


def command(request: Request) -> int:
    """Print loss, perplexity and bits per byte, or of a task how much is right; as JSON with --json."""
    split, file = request.flags.get("split", "val"), request.flags.get("file")
    if file is not None and "split" in request.flags:
        raise UserError("--split and --file exclude each other: give one of them")
    if split not in SPLITS:
        raise UserError(f"--split={split}: expected train or val")
    opened = open_trained(request)
    config = opened.config
    tokenizer = tokenizer_of(config)
    chosen = _chosen(config, tokenizer, split, file)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    model = load_model(opened.checkpoint, config, vocab, opened.device, opened.ema)
    bf16, task = config.trainer.precision == "bf16", config.data.kind in TASKS

    def score(rows: Numbered) -> Score:
        at_once = config.trainer.micro_batch or max(1, 16384 // rows.seq_len)
        return evaluate(model, rows, opened.device, at_once, bf16, answers=task)

    found = score(chosen.rows)
    lengths = {n: score(rows) for n, rows in chosen.lengths.items()}
    report: dict[str, Any] = {
        "run": str(opened.run.folder),
        "checkpoint": opened.checkpoint.name,
        "weights": "ema" if opened.ema else "trained",
        "text": chosen.name,
        **_figures(found, chosen),
        "tokens": chosen.tokens,
        "bytes": chosen.bytes,
        "labels": found.labels,
        "seq_len": config.data.seq_len,
    }
    if lengths:
        report["lengths"] = {str(n): _figures(one, chosen) for n, one in lengths.items()}
    if request.as_json:
        print(json.dumps(report, indent=2))
        return FINISHED
    for notice in opened.run.notices:
        print(notice, file=sys.stderr)
    where = f"{opened.run.folder}, {opened.checkpoint.name}"
    where += ", moving average of the weights" if opened.ema else ""
    print("\n".join(_lines(report, found, lengths, where)))
    return FINISHED


def _figures(found: Score, chosen: Scored) -> dict[str, float]:
    """The figures of a score for the JSON report."""
    said = {"loss": found.loss, "perplexity": found.perplexity, **found.accuracies()}
    if chosen.bytes:
        said["bits_per_byte"] = found.bits_per_byte(chosen.tokens, chosen.bytes)
    return said


def _lines(report: dict[str, Any], found: Score, lengths: dict[int, Score], where: str) -> list[str]:
    """The report for a reader."""
    if found.right is None:
        return [
            f"{report['text']}: loss {found.loss:.4f} nats a token, perplexity {found.perplexity:.3f}, "
            f"{report['bits_per_byte']:.4f} bits per byte",
            f"{found.labels:,} labels in rows of {report['seq_len']} tokens, {report['bytes']:,} bytes; "
            + where,
        ]
    lines = [f"{report['text']}: {_right(found)}"]
    lines += [f"rows of {n}: {_right(one)}" for n, one in lengths.items()]
    return [*lines, f"{found.labels:,} answers in {found.rows:,} rows of {report['seq_len']} tokens; {where}"]


def _right(found: Score) -> str:
    said = found.accuracies()
    return (
        f"{100 * said['accuracy']:.2f} % right, {100 * said['row_accuracy']:.2f} % of the rows, "
        f"loss {found.loss:.4f} nats an answer"
    )


def _chosen(config: RunConfig, tokenizer: Tokenizer, split: str, file: str | None) -> Scored:
    """The rows that the line asks for."""
    if file is None:
        return _split(config, open_data(config, tokenizer), split)
    if config.data.kind in TASKS:
        raise UserError(
            f"--file={file}: the run's data is the task {config.data.kind}, so it can read no text",
            "leave --file out to score the task, or set data.val_lengths=[…] for other lengths",
        )
    text = read_text(file, "--file")
    rows = text_rows([text], tokenizer, config.data.seq_len)
    return Scored(rows, rows.stream.tokens, len(text.encode()), str(Path(file).expanduser()), {})


def _split(config: RunConfig, data: Data, split: str) -> Scored:
    meta = data.meta[split]
    named = partial(Scored, name=f"split {split}")
    if config.data.kind in TASKS:
        rows = data.val if split == "val" else training_rows(config)
        lengths = data.lengths if split == "val" else {}
        return named(rows, rows.per_epoch * rows.seq_len, 0, lengths=lengths)
    if split == "val":
        return named(data.val, meta["tokens"], meta["bytes"], lengths={})
    # The training split's rows are shuffled in training; their set is the same in file order.
    assert isinstance(data.train, Rows)
    in_order = Rows(data.train.stream, config.data.seq_len, None, data.train.pad)
    return named(in_order, meta["tokens"], meta["bytes"], lengths={})
