"""Text from the model while it trains."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from ssmtrain.config.errors import NonFinite
from ssmtrain.data.tokenizer import Tokenizer
from ssmtrain.generate.sampler import printable, sample
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import on_first
from ssmtrain.train.module import LitLM
from ssmtrain.train.state import forked_rng


def draw(lit: LitLM, tokenizer: Tokenizer, max_tokens: int | None = None) -> str:
    """A sample, prompt included, empty but on rank 0; all ranks call it, and their random states stay."""
    page = lit.config.generate
    if max_tokens is not None:
        page = page.model_copy(update={"max_tokens": max_tokens})
    with forked_rng(lit.device), lit.autocast(), on_first(lit.model) as model:
        if model is None:
            return ""
        try:
            text = sample(model, tokenizer, page.prompt, page, lit.config.seed + lit.state.step)
        except NonFinite as error:  # what to do about it is for the steps to say
            return f"(none: {error.lines[0]})"
        return printable(page.prompt + text)


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
