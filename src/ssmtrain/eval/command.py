"""The verb eval: score a trained run on a split of its data or on a text file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from ssmtrain.checkpoint.reading import open_trained
from ssmtrain.checkpoint.weights import load_model
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.config.task_rules import tasks
from ssmtrain.data.batch import Samples
from ssmtrain.data.mixture import Ordered
from ssmtrain.data.module import Data, Rows, open_data, text_rows
from ssmtrain.data.tasks.source import training_rows
from ssmtrain.data.tokenizer import Tokenizer, tokenizer_of
from ssmtrain.eval.evaluate import Score, evaluate
from ssmtrain.eval.texts import read_text

SPLITS = ("train", "val")


class _Text(NamedTuple):
    """Rows to score, of a text or a task; those that are scored beside others have a name."""

    name: str
    rows: Ordered
    tokens: int
    bytes: int
    """Of text; 0 for a task."""


def command(request: Request) -> int:
    """Print loss, perplexity and bits per byte, or what share of a task is right; as JSON with --json."""
    split, file = request.flags.get("split", "val"), request.flags.get("file")
    if file is not None and "split" in request.flags:
        raise UserError("--split and --file exclude each other: give one of them")
    if split not in SPLITS:
        raise UserError(f"--split={split}: expected train or val")
    opened = open_trained(request)
    config = opened.config
    tokenizer = tokenizer_of(config, opened.run.folder)
    texts, lengths, what = _texts(config, tokenizer, split, file)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    model = load_model(opened.checkpoint, config, vocab, opened.device, opened.ema)
    bf16, task = config.trainer.precision == "bf16", bool(tasks(config.data))

    def score(rows: Ordered) -> Score:
        at_once = config.trainer.micro_rows or max(1, 16384 // rows.seq_len)
        return evaluate(model, rows, opened.device, at_once, bf16, answers=task)

    found = {text.name: score(text.rows) for text in texts}
    whole = found[""] if "" in found else Score.of(found)
    tokens, n_bytes = sum(t.tokens for t in texts), sum(t.bytes for t in texts)
    report: dict[str, Any] = {
        "run": str(opened.run.folder),
        "checkpoint": opened.checkpoint.name,
        "weights": "ema" if opened.ema else "trained",
        "text": what,
        **_figures(whole, tokens, n_bytes),
        "seq_len": config.data.seq_len,
    }
    sets = {t.name: _figures(found[t.name], t.tokens, t.bytes) for t in texts if t.name}
    if sets:
        report["sets"] = sets
    if lengths:
        report["lengths"] = {
            n: _figures(score(rows), rows.per_epoch * rows.seq_len, 0) for n, rows in lengths.items()
        }
    if request.as_json:
        print(json.dumps(report, indent=2))
        return FINISHED
    for notice in opened.run.notices:
        print(notice, file=sys.stderr)
    where = f"{opened.run.folder}, {opened.checkpoint.name}"
    where += ", moving average of the weights" if opened.ema else ""
    print("\n".join(_of_task(report, whole, where) if task else _of_text(report, where)))
    return FINISHED


def _of_text(report: dict[str, Any], where: str) -> list[str]:
    """The report for a reader."""
    lines = [
        f"{report['text']}: loss {report['loss']:.4f} nats a token, perplexity {report['perplexity']:.3f}, "
        f"{report['bits_per_byte']:.4f} bits per byte",
        f"{report['labels']:,} labels in rows of {report['seq_len']} tokens, {report['bytes']:,} bytes; "
        + where,
    ]
    for name, one in report.get("sets", {}).items():
        lines.append(
            f"{name}: loss {one['loss']:.4f}, perplexity {one['perplexity']:.3f}, "
            f"{one['bits_per_byte']:.4f} bits per byte of {one['bytes']:,}"
        )
    return lines


def _of_task(report: dict[str, Any], whole: Score, where: str) -> list[str]:
    """The report of a task for a reader."""
    lines = [f"{report['text']}: {_right(report)}"]
    lines += [f"{name}: {_right(one)}" for name, one in report.get("sets", {}).items()]
    lines += [f"rows of {n}: {_right(one)}" for n, one in report.get("lengths", {}).items()]
    return [*lines, f"{whole.labels:,} answers in {whole.rows:,} rows of {report['seq_len']} tokens; {where}"]


def _right(found: dict[str, Any]) -> str:
    return (
        f"{100 * found['accuracy']:.2f} % right, {100 * found['row_accuracy']:.2f} % of the rows, "
        f"loss {found['loss']:.4f} nats an answer"
    )


def _figures(score: Score, tokens: int, n_bytes: int) -> dict[str, Any]:
    said: dict[str, Any] = {"loss": score.loss, "perplexity": score.perplexity, **score.accuracies()}
    if n_bytes:
        said["bits_per_byte"] = score.bits_per_byte(tokens, n_bytes)
    return {**said, "tokens": tokens, "bytes": n_bytes, "labels": score.labels}


def _texts(
    config: RunConfig, tokenizer: Tokenizer, split: str, file: str | None
) -> tuple[list[_Text], dict[str, Ordered], str]:
    """What is scored, at which further lengths, and what it is called: a file or a split."""
    if file is None:
        return *_split(config, open_data(config, tokenizer), split), f"split {split}"
    found = tasks(config.data)
    if found:
        key, task = next(iter(found.items()))
        raise UserError(
            f"--file={file}: the run's data is the task {task.kind}, so it can read no text",
            f"leave --file out to score the task, or set {key}.val_lengths=[…] for other lengths",
        )
    text = read_text(file, "--file")
    whole = text_rows([text], tokenizer, config.data.seq_len)
    one = _Text("", whole, whole.stream.tokens, len(text.encode()))
    return [one], {}, str(Path(file).expanduser())


def _split(config: RunConfig, data: Data, split: str) -> tuple[list[_Text], dict[str, Ordered]]:
    """A split, of several sets or sources each."""
    if tasks(config.data):
        sets: dict[str, Ordered] = dict(data.sets) or {"": data.val}
        if split == "train":
            sets = {**training_rows(config)}
        lengths = data.lengths if split == "val" else {}
        return [_Text(name, rows, rows.per_epoch * rows.seq_len, 0) for name, rows in sets.items()], lengths
    parts: dict[str, Ordered] = dict(data.sets) or {"": data.val}
    if split == "train":
        # The training split's rows are shuffled in training; their set is the same in file order.
        shuffled: dict[str, Samples] = {**data.sources} or {"": data.train}
        parts = {name: part.in_order() for name, part in shuffled.items() if isinstance(part, Rows)}
    found = []
    for name, part in parts.items():
        meta = data.meta[f"{split}/{name}" if name else split]
        found.append(_Text(name, part, meta["tokens"], meta["bytes"]))
    return found, {}
