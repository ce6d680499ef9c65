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
from ssmtrain.data.batch import Samples
from ssmtrain.data.mixture import Ordered
from ssmtrain.data.module import Rows, open_data, text_rows
from ssmtrain.data.tokenizer import Tokenizer, load_tokenizer
from ssmtrain.eval.evaluate import Score, evaluate

SPLITS = ("train", "val")


def command(request: Request) -> int:
    """Print loss, perplexity and bits per byte; as JSON with --json."""
    split, file = request.flags.get("split", "val"), request.flags.get("file")
    if file is not None and "split" in request.flags:
        raise UserError("--split and --file exclude each other: give one of them")
    if split not in SPLITS:
        raise UserError(f"--split={split}: expected train or val")
    opened = open_trained(request)
    config = opened.config
    tokenizer = load_tokenizer(config.tokenizer, config.data, opened.run.folder)
    texts, what = _texts(config, tokenizer, split, file)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    model = load_model(opened.checkpoint, config, vocab, opened.device, opened.ema)
    bf16 = config.trainer.precision == "bf16"
    batch_rows = config.trainer.micro_rows or max(1, 16384 // config.data.seq_len)
    found = {t.name: evaluate(model, t.rows, opened.device, batch_rows, bf16) for t in texts}
    score = Score.of(found)
    tokens, n_bytes = sum(t.tokens for t in texts), sum(t.bytes for t in texts)
    report = {
        "run": str(opened.run.folder),
        "checkpoint": opened.checkpoint.name,
        "weights": "ema" if opened.ema else "trained",
        "text": what,
        **_figures(score, tokens, n_bytes),
        "seq_len": config.data.seq_len,
    }
    sets = {t.name: _figures(found[t.name], t.tokens, t.bytes) for t in texts if t.name}
    if sets:
        report["sets"] = sets
    if request.as_json:
        print(json.dumps(report, indent=2))
        return FINISHED
    for notice in opened.run.notices:
        print(notice, file=sys.stderr)
    print(
        f"{what}: loss {score.loss:.4f} nats a token, perplexity {score.perplexity:.3f}, "
        f"{report['bits_per_byte']:.4f} bits per byte\n"
        f"{score.labels:,} labels in rows of {config.data.seq_len} tokens, {n_bytes:,} bytes; "
        f"{opened.run.folder}, {opened.checkpoint.name}"
        + (", moving average of the weights" if opened.ema else "")
    )
    for name, one in sets.items():
        print(
            f"{name}: loss {one['loss']:.4f}, perplexity {one['perplexity']:.3f}, "
            f"{one['bits_per_byte']:.4f} bits per byte of {one['bytes']:,}"
        )
    return FINISHED


class _Text(NamedTuple):
    """A text to score; one that is scored beside others has a name."""

    name: str
    rows: Ordered
    tokens: int
    bytes: int


def _figures(score: Score, tokens: int, n_bytes: int) -> dict[str, Any]:
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(tokens, n_bytes),
        "tokens": tokens,
        "bytes": n_bytes,
        "labels": score.labels,
    }


def _texts(config: RunConfig, tokenizer: Tokenizer, split: str, file: str | None) -> tuple[list[_Text], str]:
    """What is scored, and what it is called: a file, or a split, of several sets or sources each."""
    if file is None:
        data = open_data(config, tokenizer)
        rows: dict[str, Ordered] = {"": data.val}
        if split == "train":
            # The training split's rows are shuffled in training; their set is the same in file order.
            parts: dict[str, Samples] = {**data.sources} or {"": data.train}
            rows = {name: part.in_order() for name, part in parts.items() if isinstance(part, Rows)}
        elif data.sets:
            rows = dict(data.sets)
        found = []
        for name, part in rows.items():
            meta = data.meta[f"{split}/{name}" if name else split]
            found.append(_Text(name, part, meta["tokens"], meta["bytes"]))
        return found, f"split {split}"
    path = Path(file).expanduser()
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"--file={file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file={file}: not UTF-8 text (byte {error.start})") from None
    whole = text_rows([text], tokenizer, config.data.seq_len)
    return [_Text("", whole, whole.stream.tokens, len(text.encode()))], str(path)
