"""Warns of a rank that keeps the others waiting, by one small message at every record of the figures."""

from __future__ import annotations

import logging
import socket
from typing import Any

import torch
from lightning.pytorch import Callback

from ssmtrain.parallel import ranks
from ssmtrain.train.module import LitLM
from ssmtrain.train.pace import Judge, Pace

log = logging.getLogger(__name__)


class Paces(Callback):
    """Every `every` steps the ranks tell each other how long they have worked by themselves."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.judge = Judge()
        self.hosts: list[str] = []
        self.step = 0
        """Of the latest look."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        lit: LitLM = pl_module
        if ranks.active():
            self.hosts, self.step = ranks.texts(socket.gethostname()), lit.state.step
            lit.pace = Pace(lit.device)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Compare, where a record is due."""
        lit: LitLM = pl_module
        if lit.pace is None or lit.state.step % self.every:
            return
        mine = torch.tensor(lit.pace.take(), dtype=torch.float64, device=lit.device)
        told = [pair.tolist() for pair in ranks.gather(mine)]
        steps, self.step = lit.state.step - self.step, lit.state.step
        if ranks.rank():
            return
        whole = max(seconds for _, seconds in told)
        for rank, seconds, others, since in self.judge.look([own for own, _ in told], whole, steps):
            figures = {"seconds": seconds, "others": others, "steps": since}
            lit.journal.write("slow", lit.state.step, rank=rank, host=self.hosts[rank], **figures)
            log.warning(
                "rank %d on %s is slow: %.3g s of its own a step, the others %.3g s, for %d steps now; see "
                "there what else runs (top, nvidia-smi) and the GPU's clocks (nvidia-smi -q -d PERFORMANCE)",
                *(rank, self.hosts[rank], seconds, others, since),
            )
