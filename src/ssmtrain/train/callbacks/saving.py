"""Checkpoints every so many steps and at every planned stop; a save that fails is survived, three are not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.best import Best
from ssmtrain.checkpoint.runs import Run
from ssmtrain.config.errors import UserError
from ssmtrain.parallel import ranks
from ssmtrain.train import snapshot
from ssmtrain.train.module import LitLM

log = logging.getLogger(__name__)

MAX_FAILURES = 3


class Saving(Callback):
    """Saves off RunState's clock; rank 0 writes and tells the others whether it worked."""

    def __init__(self, run: Run, every: int, keep: int, keep_every: int | None = None) -> None:
        self.run, self.every, self.keep, self.keep_every = run, every, keep, keep_every
        self.saved: Path | None = run.checkpoint
        self.best: Best | None = None
        """Rank 0's."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the best checkpoint so far, and follow the validations to come."""
        lit: LitLM = pl_module
        if ranks.rank() == 0:
            self.best = Best(self.run.folder, self.run.checkpoints, self.run.metrics)
            lit.journal.sinks.append(self.best)
            self._link()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Save where the step is due or the last of this process."""
        lit: LitLM = pl_module
        if lit.stop or lit.state.step % self.every == 0:
            with lit.clock("save"):
                self.save(lit)

    def save(self, lit: LitLM) -> None:
        """Publish a checkpoint and prune; UserError when a planned stop, or a third try in a row, fails."""
        tensors, state = snapshot.take(lit)
        problem = None
        if ranks.rank() == 0:
            problem = self._write(lit.state.step, lit.state.tokens, tensors, state)
        problem = ranks.agree(problem)
        if problem is None:
            lit.state.save_failures = 0
            lit.journal.write("save", lit.state.step, path=str(self.saved))
            return
        lit.state.save_failures += 1
        if lit.stop or lit.state.save_failures >= MAX_FAILURES:
            last = self.saved.name if self.saved else "none"
            raise UserError(
                f"checkpoint not saved: {problem}",
                f"the last good one: {last}; free space under {self.run.folder}, then the same command again",
            )
        left = MAX_FAILURES - lit.state.save_failures
        log.warning("checkpoint not saved, training goes on (%d more failures stop it): %s", left, problem)

    def _write(self, step: int, tokens: int, tensors: snapshot.Tensors, state: dict[str, Any]) -> str | None:
        """Write, mark and prune on rank 0; returns what went wrong."""
        try:
            self.saved = store.save(self.run.checkpoints, step, tensors, state)
            self.run.mark("unfinished", step, tokens)
        except (store.SaveFailed, OSError) as error:
            return str(error)
        self._link()  # before old ones go: what it leaves is deleted, what it comes to is not
        try:
            store.prune(self.run.checkpoints, self.keep, self._is_kept)
        except OSError as error:
            log.warning("old checkpoints stay: %s", error)
        return None

    def _link(self) -> None:
        try:
            if self.best is not None:
                self.best.link()
        except OSError as error:
            log.warning("the link to the best checkpoint is not up to date: %s", error)

    def _is_kept(self, step: int) -> bool:
        """Whether a checkpoint stays whatever its age: of every so many steps, and the best."""
        at_interval = self.keep_every is not None and step % self.keep_every == 0
        return at_interval or (self.best is not None and step == self.best.step)
