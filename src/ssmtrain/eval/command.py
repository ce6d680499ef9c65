"""The verb eval: score a trained run on a split of its data or on a text file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ssmtrain.checkpoint.reading import open_trained
from ssmtrain.checkpoint.weights import load_model
from ssmtrain.config.errors import FINISHED, UserError
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.module import Rows, open_data, text_rows
from ssmtrain.data.tokenizer import Tokenizer, load_tokenizer
from ssmtrain.eval.evaluate import evaluate

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
    rows, tokens, n_bytes, what = _text(config, tokenizer, split, file)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    model = load_model(opened.checkpoint, config, vocab, opened.device, opened.ema)
    bf16 = config.trainer.precision == "bf16"
    batch_rows = config.trainer.micro_batch or max(1, 16384 // config.data.seq_len)
    score = evaluate(model, rows, opened.device, batch_rows, bf16)
    report = {
        "run": str(opened.run.folder),
        "checkpoint": opened.checkpoint.name,
        "weights": "ema" if opened.ema else "trained",
        "text": what,
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte(tokens, n_bytes),
        "tokens": tokens,
        "bytes": n_bytes,
        "labels": score.labels,
        "seq_len": config.data.seq_len,
    }
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
    return FINISHED


def _text(
    config: RunConfig, tokenizer: Tokenizer, split: str, file: str | None
) -> tuple[Rows, int, int, str]:
    """Rows, tokens, bytes and name of what is scored."""
    if file is None:
        data = open_data(config, tokenizer)
        meta = data.meta[split]
        # The training split's rows are shuffled in training; their set is the same in file order.
        rows = (
            data.val if split == "val" else Rows(data.train.stream, config.data.seq_len, None, data.train.pad)
        )
        return rows, meta["tokens"], meta["bytes"], f"split {split}"
    path = Path(file).expanduser()
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"--file={file}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--file={file}: not UTF-8 text (byte {error.start})") from None
    rows = text_rows([text], tokenizer, config.data.seq_len)
    return rows, rows.stream.tokens, len(text.encode()), str(path)
