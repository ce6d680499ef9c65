"""Validation off the run's own clock, under its own random state."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback

from ssmtrain.eval.evaluate import Score, evaluate
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import cut_again, is_cut
from ssmtrain.train.module import LitLM
from ssmtrain.train.state import forked_rng

MIN_TOKENS = 8192
"""Tokens of a validation batch, at least."""


def validate(lit: LitLM, max_rows: int | None = None) -> Score:
    """Score the validation split, or its first max_rows rows, on all ranks together."""
    trainer, seq_len = lit.config.trainer, lit.config.data.seq_len
    rows = trainer.micro_rows or lit.state.micro_batch or trainer.global_batch // seq_len // ranks.world()
    # Short rows are scored many at a time: without gradients they need little memory.
    rows = max(rows, math.ceil(MIN_TOKENS / seq_len))
    cut = is_cut(lit.model)
    with lit.clock("val"), forked_rng(lit.device):
        score = evaluate(
            lit.model,
            lit.text.val,
            lit.device,
            batch_rows=rows,
            bf16=trainer.precision == "bf16",
            max_rows=max_rows,
            rank=ranks.rank(),
            world=ranks.world(),
            reduce=ranks.sum_,
            together=cut,
        )
        if cut:
            cut_again(lit.model)
        return score


def first_rows(lit: LitLM) -> int | None:
    """How many rows a validation along the way takes; None: all."""
    tokens = lit.config.trainer.val_tokens
    return tokens and math.ceil(tokens / lit.config.data.seq_len)


def figures(lit: LitLM, score: Score) -> dict[str, float]:
    """Loss, perplexity and bits per byte of a score on the validation split."""
    meta = lit.text.meta["val"]
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bpb": score.bits_per_byte(meta["tokens"], meta["bytes"]),
        "labels": score.labels,
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
        note(lit, validate(lit, first_rows(lit)))


def note(lit: LitLM, score: Score) -> dict[str, float]:
    """Record a score and remember the best."""
    state, found = lit.state, figures(lit, score)
    if math.isfinite(score.loss) and (state.best_val is None or score.loss < state.best_val):
        state.best_val, state.best_step = score.loss, state.step
    lit.journal.write("val", state.step, tokens=state.tokens, **found)
    return found
