"""Steps of a run once more, in one process, by the code that took them; nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback

from ssmtrain.checkpoint.runs import Run
from ssmtrain.config.errors import NonFinite, UserError
from ssmtrain.config.logger import NoLogger
from ssmtrain.config.parallel import AutoParallel
from ssmtrain.config.schema import RunConfig
from ssmtrain.data.module import Data
from ssmtrain.data.tokenizer import tokenizer_of
from ssmtrain.kernels import backend
from ssmtrain.train.clock import Clock
from ssmtrain.train.fit import make_trainer, place
from ssmtrain.train.module import LitLM
from ssmtrain.train.signals import Signals


@dataclass(frozen=True)
class Taken:
    """What a step did, in figures to the bit."""

    step: int
    loss: float
    mean: float
    """Mean loss of the steps since the one before that was recorded, as the run would record it."""
    grad_norm: float
    lr: float
    skipped: bool
    samples: list[Any]
    """Rows as the ledger has them, of a mixture as "source:row"."""


@dataclass(eq=False)
class Replay(Callback):
    """Stops after a step, keeps what each did, and shows the gradient of one of them to `watch`."""

    step: int
    until: int
    """The last step to take, `step` or a later one that the run recorded."""
    recorded: set[int]
    """Steps at which the run wrote a train record."""
    rows: int
    """Rows consumed before the first step: more than the checkpoint's where the run went back to it."""
    watch: Callable[[LitLM], None]
    """Called at the step, the gradient in place and the weights those that it was taken with."""
    world: int = 1
    """Ranks that took the steps: as many parts are taken in turn, however large the step is."""
    taken: list[Taken] = field(default_factory=list)
    micro: int = 0
    """Rows of a micro-batch of a step of the whole size."""
    nonfinite: list[str] = field(default_factory=list)
    """Where the first number that is not finite is, when that ended the run."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the gradient when the step has it."""
        lit: LitLM = pl_module

        def look() -> None:
            if lit.state.step + 1 == self.step:
                self.watch(lit)

        lit.on_gradients.append(look)
        lit.state.rows = self.rows

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Cut a step of a growing batch as its ranks did: `alone` knows of those of the whole size only."""
        lit: LitLM = pl_module
        page, rows = lit.config.trainer, lit.config.data.seq_len
        if self.world > 1 and page.global_batch_warmup and page.micro_rows is not None:
            mine = max(1, lit.horizon.batches.at(lit.state.tokens) // rows // self.world)
            self.micro = self.micro or page.micro_rows
            trainer_page = page.model_copy(update={"micro_batch": min(self.micro, mine)})
            lit.config = lit.config.model_copy(update={"trainer": trainer_page})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Keep the step's figures; the window of losses is that of callbacks/metrics.py."""
        lit: LitLM = pl_module
        state, last = lit.state, lit.last
        assert last is not None
        if not last.skipped:
            state.window_loss += last.loss
            state.window_steps += 1
        mean = state.window_loss / state.window_steps if state.window_steps else float("nan")
        samples = lit.text.train.names(last.samples)
        self.taken.append(Taken(state.step, last.loss, mean, last.grad_norm, last.lr, last.skipped, samples))
        if state.step in self.recorded:
            state.window_loss, state.window_steps = 0.0, 0
        if state.step >= self.until:
            lit.stop = "replayed"


def alone(config: RunConfig, world: int) -> RunConfig:
    """The run's config for one process, which takes in turn what each of `world` ranks took at once."""
    trainer = config.trainer
    rows: int | str | None = trainer.micro_batch
    if world > 1 and rows is None:
        rows = trainer.global_batch // config.data.seq_len // world
    page = trainer.model_copy(
        update={"devices": 1, "micro_batch": rows, "max_seconds": None, "profile": None}
    )
    changes = {"trainer": page, "parallel": AutoParallel(), "logger": NoLogger(), "ema": None}
    return config.model_copy(update=changes)


def run_again(config: RunConfig, data: Data, run: Run, replay: Replay) -> None:
    """Take the steps that follow run.checkpoint (or the start) until `replay` has seen enough.

    UserError where the machine lacks what the config asks for; KeyboardInterrupt where a signal ended it.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    accelerator, _ = place(config)
    try:
        backend.configure(config.trainer.kernels, "cuda" if accelerator == "gpu" else "cpu")
    except backend.BackendError as error:
        raise UserError(f"trainer.kernels: {error}") from None
    vocab = config.model.vocab_size or tokenizer_of(config, run.folder).vocab_size
    signals = Signals()
    lit = LitLM(config, vocab, data, signals, Clock(), run.checkpoint, run.origin)
    try:
        make_trainer(config, run, accelerator, 1, [replay]).fit(lit)
    except NonFinite as error:
        replay.nonfinite = list(error.lines)
    finally:
        signals.restore()
    if signals.asked:
        raise KeyboardInterrupt
