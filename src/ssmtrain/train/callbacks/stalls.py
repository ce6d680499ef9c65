"""Ends a run of several ranks in which none gets further, with the rank and the place named."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback

from ssmtrain.checkpoint.runs import Run
from ssmtrain.config.errors import LOST
from ssmtrain.parallel import ranks
from ssmtrain.parallel.processes import GRACE, children
from ssmtrain.train import attempts, report
from ssmtrain.train.module import LitLM
from ssmtrain.train.stall import Watcher, culprits


class Stalls(Callback):
    """A watcher on every rank, from the first step to the last."""

    def __init__(self, run: Run, limit: float) -> None:
        self.run, self.limit = run, limit
        self.forwards = 0
        self.watcher: Watcher | None = None
        self.trainer: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count forward passes and begin to watch."""
        if not ranks.active():
            return
        lit: LitLM = pl_module
        self.trainer = trainer
        lit.model.register_forward_pre_hook(self._count)
        folder = self.run.folder / "beats"
        self.watcher = Watcher(
            folder,
            ranks.rank(),
            ranks.world(),
            self.limit,
            lambda: (lit.state.step, self.forwards),
            self._end,
        )
        self.watcher.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Watch no more."""
        if self.watcher is not None:
            self.watcher.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Watch no more."""
        self.on_train_end(trainer, pl_module)

    def _count(self, *args: Any) -> None:
        self.forwards += 1

    def _end(self, said: str) -> None:
        """Say it, once for all ranks, and end: the main thread is in a collective and cannot."""
        if ranks.rank():
            time.sleep(GRACE / 2)  # rank 0 says it, unless it is the one
        text = f"error: {said}\n       continue with: {report.how_to_continue(self.run)}\n"
        os.write(sys.stderr.fileno(), text.encode())
        for process in children(self.trainer):
            process.kill()
        if os.environ.get("SSMTRAIN_PARENT") == str(os.getppid()):
            os.kill(os.getppid(), signal.SIGKILL)  # a stopped process ends by nothing else
        # The disk may be what it stands for: the end does not wait for it.
        word = threading.Thread(target=self._leave_word, args=(said,), daemon=True)
        word.start()
        word.join(GRACE)
        os._exit(LOST)

    def _leave_word(self, said: str) -> None:
        with contextlib.suppress(OSError):
            attempts.leave_word(self.run.folder / attempts.FILE, f"stalled: {culprits(said)}")
