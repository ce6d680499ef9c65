"""Validation off the run's own clock, under its own random state."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback

from ssmtrain.eval.evaluate import Score
from ssmtrain.train import scoring
from ssmtrain.train.module import LitLM
from ssmtrain.train.scoring import Text, score


def validate(lit: LitLM, max_rows: int | None = None) -> Score:
    """Score the validation split, or its first max_rows rows, on all ranks together; of several sets each."""
    found = {name: score(lit, text, max_rows) for name, text in lit.text.sets.items()}
    return Score.of(found) if found else score(lit, lit.text.val, max_rows)


def first_rows(lit: LitLM) -> int | None:
    """How many rows a validation along the way takes; None: all."""
    tokens = lit.config.trainer.val_tokens
    return tokens and math.ceil(tokens / lit.config.data.seq_len)


def figures(lit: LitLM, found: Score, text: str = "val") -> dict[str, Any]:
    """Loss, perplexity and bits per byte, or accuracies, of a score on the validation split, and of each of
    its sets."""
    meta = lit.text.meta[text]
    said = scoring.figures(found, Text(meta["tokens"], meta["bytes"]) if meta["bytes"] else None)
    return {**said, **{name: figures(lit, one, f"val/{name}") for name, one in found.sets.items()}}


def lengths(lit: LitLM, max_tokens: int | None = None) -> dict[str, dict[str, float]]:
    """Figures of a task's rows of other lengths, the first max_tokens of each, by length."""
    return {
        n: scoring.figures(score(lit, rows, max_tokens and math.ceil(max_tokens / rows.seq_len)), None)
        for n, rows in lit.text.lengths.items()
    }


class Validation(Callback):
    """Validates every so many steps; the last one, over the whole split, belongs to the report."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Validate where the step is due and the run goes on."""
        lit: LitLM = pl_module
        if not self.every or lit.stop or lit.state.step % self.every:
            return
        note(lit, validate(lit, first_rows(lit)), lengths(lit, lit.config.trainer.val_tokens))


def note(lit: LitLM, score: Score, further: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Record a score, with those of further lengths, and remember the best."""
    state, found = lit.state, figures(lit, score)
    if math.isfinite(score.loss) and (state.best_val is None or score.loss < state.best_val):
        state.best_val, state.best_step = score.loss, state.step
    said = {**found, "lengths": further} if further else found
    lit.journal.write("val", state.step, tokens=state.tokens, **said)
    return said
