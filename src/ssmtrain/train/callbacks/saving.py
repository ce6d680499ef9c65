"""Checkpoints every so many steps and at every planned stop; a save that fails is survived, three are not."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from ssmtrain.checkpoint import joint, store
from ssmtrain.checkpoint.best import Best
from ssmtrain.checkpoint.runs import Run
from ssmtrain.config.carry import slots
from ssmtrain.config.errors import UserError
from ssmtrain.config.trainer import TrainerConfig
from ssmtrain.model.count import carried_bytes
from ssmtrain.parallel import ranks
from ssmtrain.parallel.shard import shape_of
from ssmtrain.train import optim, snapshot
from ssmtrain.train.hold import Hold
from ssmtrain.train.module import LitLM

log = logging.getLogger(__name__)

MAX_FAILURES = 3
ROOM = 1.2
"""Checkpoints for which there must be room at the start: the old ones go when a new one is there."""
THERE = "there"
"""In place of a token: a good checkpoint of the step is there already."""


class Saving(Callback):
    """Saves off RunState's clock: each rank its share, side by side, and all agree on whether it worked.

    With `save_async` a thread writes a copy in host memory, and what came of it is known at the next save.
    """

    def __init__(self, run: Run, config: TrainerConfig) -> None:
        self.run, self.config = run, config
        self.saved: Path | None = run.checkpoint
        self.best: Best | None = None
        """Rank 0's."""
        self.thread = ThreadPoolExecutor(1, "ssmtrain-save") if config.save_async else None
        self.hold = Hold()
        self.reserving: Future[None] | None = None
        """Host memory on its way."""
        self.pending: tuple[int, Future[str | None]] | None = None
        """A step, and what is to be known of its save."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """See that a checkpoint has room, find the best so far, and follow the validations to come."""
        lit: LitLM = pl_module
        lit.newest_checkpoint = lambda: self.newest(lit)
        problem = ranks.agree(self._no_room(lit) if ranks.rank() == 0 else None)
        if problem is not None:
            raise UserError(problem, "free some, or put the run elsewhere with runs_dir=…")
        if ranks.rank() == 0:
            self.best = Best(self.run.folder, self.run.checkpoints, self.run.metrics)
            lit.journal.sinks.append(self.best)
            self._link()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Save where the step is due or the last of this process."""
        lit: LitLM = pl_module
        if lit.stop or lit.state.step % self.config.save_every == 0:
            with lit.clock("save"):
                self.save(lit)
        elif self.thread is not None and self.reserving is None:
            # After the first step there is all that a checkpoint holds.
            self.reserving = self.thread.submit(self.hold.reserve, snapshot.take(lit)[0])

    def _no_room(self, lit: LitLM) -> str | None:
        """What to say where the disk cannot take a checkpoint: better now than after an hour."""
        named = dict(lit.model.named_parameters())
        weights = sum(shape_of(parameter).numel() * parameter.element_size() for parameter in named.values())
        copies = 2 if lit.config.ema is not None else 1
        size = copies * weights + optim.state_bytes(named, lit.config.optim)
        size += carried_bytes(lit.config.model, slots(lit.config) or 0)
        free = shutil.disk_usage(self.run.folder).free
        if free >= ROOM * size:
            return None
        return (
            f"{self.run.folder}: {free / 1e9:.3g} GB are free there, a checkpoint takes {size / 1e9:.3g} GB"
        )

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wait for the last save."""
        if self.thread is not None:
            self.thread.shutdown()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """What is being written when training fails is still a good checkpoint."""
        self.teardown(trainer, pl_module, "fit")

    def save(self, lit: LitLM) -> None:
        """Publish a checkpoint and prune; UserError when a planned stop, or a third try in a row, fails."""
        self.settle(lit)
        step = lit.state.step
        lit.state.rollbacks_row = 0
        shares, state = snapshot.take(lit)
        token, problem = self._begin(step)
        write = partial(self._write, step, lit.state.tokens, token, state)
        if problem is None and self.thread is not None and not lit.stop:
            if self.reserving is not None:
                self.reserving.result()
            self.pending = step, self.thread.submit(write, self.hold.copy(shares))
            return
        self._report(lit, step, problem or write(shares))

    def settle(self, lit: LitLM) -> None:
        """Wait for the save under way, if there is one, and agree on what came of it."""
        if self.pending is not None:
            (step, found), self.pending = self.pending, None
            self._report(lit, step, found.result())

    def newest(self, lit: LitLM) -> Path | None:
        """The run's newest good checkpoint, the same on every rank."""
        self.settle(lit)
        found = store.newest_good(self.run.checkpoints, log.warning) if ranks.rank() == 0 else None
        text = ranks.from_first(None if found is None else str(found))
        return None if text is None else Path(text)

    def _report(self, lit: LitLM, step: int, problem: str | None) -> None:
        problem = ranks.agree(problem)
        if problem is None:
            lit.state.save_failures = 0
            lit.journal.write("save", step, path=str(self.saved))
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

    def _begin(self, step: int) -> tuple[str, str | None]:
        """What the ranks know the folder by that they will write to, and what went wrong."""
        if not ranks.active():
            return "", None
        text = ""
        if ranks.rank() == 0:
            try:
                text = store.begin(self.run.checkpoints, step) or THERE
            except store.SaveFailed as error:
                text = f"!{error}"
        text = ranks.from_first(text) or ""
        return ("", text[1:]) if text.startswith("!") else (text, None)

    def _write(
        self, step: int, tokens: int, token: str, state: dict[str, Any], shares: snapshot.Shares
    ) -> str | None:
        """Write this rank's share, and on rank 0 publish, mark and prune; returns what went wrong."""
        folder, rank = self.run.checkpoints, ranks.rank()
        try:
            if not token:
                tensors = {kind: {n: p.tensor for n, p in parts.items()} for kind, parts in shares.items()}
                self.saved = store.save(folder, step, tensors, state)
            elif token == THERE:
                self.saved = folder / store.step_name(step)
            elif rank:
                joint.follow(folder, step, token, rank, shares)
            else:
                self.saved = joint.lead(folder, step, token, ranks.world(), shares, state)
            if rank == 0:
                self.run.mark("unfinished", step, tokens)
        except (store.SaveFailed, OSError) as error:
            return str(error)
        if rank == 0:
            self._link()  # before old ones go: what it leaves is deleted, what it comes to is not
            self._prune()
        return None

    def _prune(self) -> None:
        try:
            store.prune(self.run.checkpoints, self.config.keep_last, self._is_kept)
        except OSError as error:
            log.warning("old checkpoints stay: %s", error)

    def _link(self) -> None:
        try:
            if self.best is not None:
                self.best.link()
        except OSError as error:
            log.warning("the link to the best checkpoint is not up to date: %s", error)

    def _is_kept(self, step: int) -> bool:
        """Whether a checkpoint stays whatever its age: of every so many steps, and the best."""
        every = self.config.keep_every
        at_interval = every is not None and step % every == 0
        return at_interval or (self.best is not None and step == self.best.step)
