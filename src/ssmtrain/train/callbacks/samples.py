"""Text, or answers to a task, from the model while it trains."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from ssmtrain.config.errors import NonFinite
from ssmtrain.data.module import Batch
from ssmtrain.data.pack import IGNORE
from ssmtrain.data.tasks.rows import TaskRows
from ssmtrain.data.tokenizer import Tokenizer
from ssmtrain.generate.sampler import printable, sample
from ssmtrain.layers.base import Context
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import on_first
from ssmtrain.train.module import LitLM
from ssmtrain.train.state import forked_rng

SHOWN = 32
"""Answers of a task that a sample shows."""


def draw(lit: LitLM, tokenizer: Tokenizer, max_tokens: int | None = None) -> str:
    """A sample, prompt included (of a task: the answers in a row), empty but on rank 0.

    All ranks call it, and their random states stay.
    """
    page = lit.config.generate
    if max_tokens is not None:
        page = page.model_copy(update={"max_tokens": max_tokens})
    with forked_rng(lit.device), lit.autocast(), on_first(lit.model) as model:
        if model is None:
            return ""
        sets = lit.text.sets or {"": lit.text.val}
        said = {
            name: answers(model, rows.batch_rows([0]).to(lit.device))
            for name, rows in sets.items()
            if isinstance(rows, TaskRows)
        }
        if said:
            return "\n".join(f"{name}: {text}" if name else text for name, text in said.items())
        try:
            text = sample(model, tokenizer, page.prompt, page, lit.config.seed + lit.state.step)
        except NonFinite as error:  # what to do about it is for the steps to say
            return f"(none: {error.lines[0]})"
        return printable(page.prompt + text)


@torch.no_grad()
def answers(model: HybridModel, batch: Batch) -> str:
    """What the model answers in a row of a task, and where it is wrong what is right."""
    was = model.training
    model.eval()
    out = model(batch.inputs, batch.labels, Context(n_docs=batch.n_docs), answers=True)
    model.train(was)
    assert out.answers is not None
    pairs = list(zip(out.answers.tolist(), batch.labels[batch.labels != IGNORE].tolist(), strict=True))
    right = sum(said == wanted for said, wanted in pairs)
    shown = [str(said) if said == wanted else f"{said} (not {wanted})" for said, wanted in pairs[:SHOWN]]
    more = ["…"] if len(pairs) > SHOWN else []
    return f"{right} of {len(pairs)} answers right in the first row: {', '.join([*shown, *more])}"


class Samples(Callback):
    """Prints a sample every so many steps."""

    def __init__(self, tokenizer: Tokenizer, every: int) -> None:
        self.tokenizer, self.every = tokenizer, every

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Sample where the step is due and the run goes on."""
        lit: LitLM = pl_module
        if not self.every or lit.stop or lit.state.step % self.every:
            return
        with lit.clock("sample"):
            text = draw(lit, self.tokenizer)
        if ranks.rank() == 0:
            lit.journal.write("sample", lit.state.step, text=text)
