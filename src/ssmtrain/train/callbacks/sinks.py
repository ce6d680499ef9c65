"""Opens the places that records go to, on rank 0, once it is known which rank this is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from ssmtrain.checkpoint.runs import Run
from ssmtrain.parallel import ranks
from ssmtrain.train.attempts import Attempts
from ssmtrain.train.callbacks.console import Console
from ssmtrain.train.journal import JsonLines
from ssmtrain.train.module import LitLM


class Sinks(Callback):
    """metrics.jsonl and the console always, a logging service where the config names one."""

    def __init__(self, run: Run, console: Console) -> None:
        self.run, self.console = run, console

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Open them."""
        lit: LitLM = pl_module
        if ranks.rank():
            return
        lit.attempts = Attempts(self.run.folder, self.run.begins_at, lit.clock)
        metrics = JsonLines(self.run.metrics)
        lit.on_back += [metrics.cut, lit.attempts.turn_back]
        lit.journal.sinks = [metrics, self.console, lit.attempts]
        page = lit.config.logger
        if page.kind == "wandb":
            from ssmtrain.train.callbacks.wandb_log import open_wandb

            sink = open_wandb(page, lit.config, self.run.name, self.run.folder)
            if sink is not None:
                lit.journal.sinks.append(sink)
        elif page.kind == "tensorboard":
            from ssmtrain.train.callbacks.tensorboard_log import TensorBoardSink

            lit.journal.sinks.append(TensorBoardSink(self.run.folder, self.run.step))
