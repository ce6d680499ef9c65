"""Rows scored while a run trains: on all ranks together, under a random state of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssmtrain.data.tasks.rows import TaskRows
from ssmtrain.eval.evaluate import Score, evaluate
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import cut_again, is_cut
from ssmtrain.train.state import forked_rng

if TYPE_CHECKING:
    from ssmtrain.data.mixture import Ordered
    from ssmtrain.train.module import LitLM

MIN_TOKENS = 8192
"""Tokens of a validation batch, at least."""


@dataclass(frozen=True)
class Text:
    """How much text some rows are."""

    tokens: int
    bytes: int


def score(lit: LitLM, rows: Ordered, max_rows: int | None = None) -> Score:
    """Score rows, or the first max_rows of them; training's bits do not change."""
    trainer = lit.config.trainer
    share = trainer.global_batch // lit.config.data.seq_len // ranks.world()
    at_once = trainer.micro_rows or lit.state.micro_batch or share
    # Short rows are scored many at a time: without gradients they need little memory.
    tokens = max(at_once * lit.config.data.seq_len, MIN_TOKENS)
    cut = is_cut(lit.model)
    with lit.clock("val"), forked_rng(lit.device):
        found = evaluate(
            lit.model,
            rows,
            lit.device,
            batch_rows=max(1, math.ceil(tokens / rows.seq_len)),
            bf16=trainer.precision == "bf16",
            max_rows=max_rows,
            rank=ranks.rank(),
            world=ranks.world(),
            reduce=ranks.sum_,
            together=cut,
            answers=isinstance(rows, TaskRows),
        )
        if cut:
            cut_again(lit.model)
        return found


def figures(found: Score, text: Text | None) -> dict[str, float]:
    """What is recorded of a score: loss, perplexity, and bits per byte of a text or accuracies of a task."""
    said = {"loss": found.loss, "perplexity": found.perplexity}
    if text is not None:
        said["bpb"] = found.bits_per_byte(text.tokens, text.bytes)
    return {**said, **found.accuracies(), "labels": found.labels}
