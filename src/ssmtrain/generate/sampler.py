"""Sampling: temperature, top-k and top-p over the logits of HybridModel.step."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ssmtrain.config.errors import NonFinite
from ssmtrain.config.schema import GenerateConfig
from ssmtrain.data.tokenizer import Tokenizer
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel


def choose(logits: Tensor, config: GenerateConfig, generator: torch.Generator) -> Tensor:
    """Draw one token per row of logits (B, V); returns (B,) int64. Temperature 0 takes the largest.

    top_k keeps the k largest logits; top_p keeps the smallest set whose probability reaches p (Holtzman et
    al. 2020), always at least one token.
    """
    if config.temperature == 0.0:
        return logits.argmax(-1)  # (B,)
    scaled = logits.float() / config.temperature  # (B, V)
    if config.top_k:
        kth = scaled.topk(min(config.top_k, scaled.shape[-1])).values[:, -1:]  # (B, 1)
        scaled = scaled.masked_fill(scaled < kth, float("-inf"))
    if config.top_p < 1.0:
        ordered, index = scaled.sort(-1, descending=True)  # (B, V)
        p = ordered.softmax(-1)
        ordered = ordered.masked_fill(p.cumsum(-1) - p >= config.top_p, float("-inf"))
        scaled = torch.full_like(scaled, float("-inf")).scatter(-1, index, ordered)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator).squeeze(-1)


@contextmanager
def _evaluating(model: HybridModel) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


@torch.inference_mode()
def _tokens(model: HybridModel, prompt: list[int], config: GenerateConfig, seed: int) -> Iterator[int]:
    device = model.input.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    with _evaluating(model):
        states = model.init_states(1, len(prompt) + config.max_tokens, torch.float32, device)
        ctx = Context(states=states)
        logits = model.prefill(torch.tensor([prompt], device=device), ctx)  # (1, V)
        for _ in range(config.max_tokens):
            if not torch.isfinite(logits.amax(-1)).all():  # a row's largest is NaN where any of it is
                raise NonFinite(
                    "the model's logits are not finite: its weights are not, or too large",
                    "take an earlier checkpoint: run=<run>/checkpoints/step-…",
                )
            token = choose(logits, config, generator)  # (1,)
            yield int(token)
            logits = model.step(token[:, None], ctx)  # (1, V)


def stream(
    model: HybridModel, tokenizer: Tokenizer, prompt: str, config: GenerateConfig, seed: int
) -> Iterator[str]:
    """Continue a prompt piece by piece, until max_tokens or the text's end; an empty one starts a document.

    The pieces joined are the decoded text: a piece is held back while it ends inside a character. NonFinite
    when the logits are not finite.
    """
    ids = [int(i) for i in tokenizer.encode(prompt)]
    made: list[int] = []
    said = ""
    for token in _tokens(model, ids or [tokenizer.eot], config, seed):
        if token == tokenizer.eot:
            break
        made.append(token)
        text = tokenizer.decode(made)
        if not text.endswith("\ufffd"):
            yield text[len(said) :]
            said = text
    yield tokenizer.decode(made)[len(said) :]


def sample(model: HybridModel, tokenizer: Tokenizer, prompt: str, config: GenerateConfig, seed: int) -> str:
    """Continue a prompt; returns the new text only. The global random state is left alone."""
    return "".join(stream(model, tokenizer, prompt, config, seed))


def printable(text: str) -> str:
    """The text with control characters shown as U+FFFD (newlines and tabs kept): terminals obey them."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)
