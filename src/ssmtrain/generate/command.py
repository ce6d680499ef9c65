"""The verb generate: continue a prompt with a trained run."""

from __future__ import annotations

import json
import sys
import time

from ssmtrain.checkpoint.reading import open_trained
from ssmtrain.checkpoint.weights import load_model
from ssmtrain.config.errors import FINISHED
from ssmtrain.config.request import Request
from ssmtrain.data.tokenizer import tokenizer_of
from ssmtrain.generate.sampler import printable, stream


def command(request: Request) -> int:
    """Print the prompt and its continuation as it is made, or both as JSON at the end."""
    opened = open_trained(request)
    config = opened.config
    tokenizer = tokenizer_of(config, opened.run.folder)
    vocab = config.model.vocab_size or tokenizer.vocab_size
    model = load_model(opened.checkpoint, config, vocab, opened.device, opened.ema)
    prompt = request.flags.get("prompt", config.generate.prompt)
    pieces, start = [], time.perf_counter()
    if not request.as_json:
        for notice in opened.run.notices:
            print(notice, file=sys.stderr)
        print(prompt, end="", flush=True)
    for piece in stream(model, tokenizer, prompt, config.generate, config.seed):
        pieces.append(piece)
        if not request.as_json:
            print(printable(piece), end="", flush=True)
    text, seconds = "".join(pieces), time.perf_counter() - start
    if request.as_json:
        report = {
            "run": str(opened.run.folder),
            "checkpoint": opened.checkpoint.name,
            "weights": "ema" if opened.ema else "trained",
            "prompt": prompt,
            "text": text,
            "seed": config.seed,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(report, indent=2))
    else:
        print()
    return FINISHED
