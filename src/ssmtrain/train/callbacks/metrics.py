"""The figures of training: loss, speed, share of the peak, where the time goes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback

from ssmtrain.parallel import ranks
from ssmtrain.train.module import LitLM
from ssmtrain.train.peaks import peak_flops


class Metrics(Callback):
    """Sends a train record at the first step, every `every` steps and at the last."""

    def __init__(self, every: int, flops_per_token: Callable[[int], int]) -> None:
        """`flops_per_token` of rows of a length."""
        self.every, self.flops = every, flops_per_token
        self.work = 0
        """FLOPs since the previous record."""
        self.mark = 0.0
        """Seconds of stepping (data included) and tokens at the previous record."""
        self.tokens = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to count."""
        lit: LitLM = pl_module
        self._begin(lit)
        lit.on_back.append(lambda step: self._begin(lit))
        self.peak = peak_flops(lit.device)

    def _begin(self, lit: LitLM) -> None:
        self.tokens = lit.state.tokens
        self.mark = time.perf_counter() - self._elsewhere(lit)

    @staticmethod
    def _bits(loss: float, lit: LitLM) -> dict[str, float]:
        """Bits per byte of a text; nothing for a task."""
        size = lit.text.bytes_per_token(max(0, lit.state.rows - 1))
        return {"bpb": loss / math.log(2.0) / size} if size else {}

    @staticmethod
    def _elsewhere(lit: LitLM) -> float:
        return sum(seconds for what, seconds in lit.clock.spent.items() if what not in ("data", "step"))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Send a record where one is due."""
        lit: LitLM = pl_module
        assert lit.last is not None
        state = lit.state
        self.work += lit.last.tokens * self.flops(lit.last.length)
        if not lit.last.skipped:
            # In the state, so that a resumed run writes the record that the unbroken one would have written.
            state.window_loss += lit.last.loss
            state.window_steps += 1
        if not (state.step % self.every == 0 or lit.stop == "finished" or state.step == 1):
            return
        if ranks.rank() == 0:
            lit.journal.write("train", state.step, **self.figures(lit))
        state.window_loss, state.window_steps = 0.0, 0

    def figures(self, lit: LitLM) -> dict[str, Any]:
        """The record: the loss is the mean of the steps since the previous one."""
        assert lit.last is not None
        now = time.perf_counter() - self._elsewhere(lit)
        seconds = max(now - self.mark, 1e-9)
        speed, pace = (lit.state.tokens - self.tokens) / seconds, self.work / seconds
        self.work = 0
        self.mark, self.tokens = now, lit.state.tokens
        loss = lit.state.window_loss / lit.state.window_steps if lit.state.window_steps else math.nan
        found: dict[str, Any] = {
            "tokens": lit.state.tokens,
            "loss": loss,
            **self._bits(loss, lit),
            "lr": lit.last.lr,
            "grad_norm": lit.last.grad_norm,
            "tokens_per_s": speed,
            "seconds": lit.clock.total,
            "time": lit.clock.split(),
        }
        if lit.lengths.stages:
            found["seq_len"] = lit.last.length
        if lit.horizon.warmup:
            found["global_batch"] = lit.last.tokens
        if lit.last.aux:
            found["aux"] = lit.last.aux
        if lit.state.nonfinite:
            found["nonfinite"] = lit.state.nonfinite
        if self.peak is not None:
            found["mfu"] = pace / (self.peak * ranks.world())
        if lit.device.type == "cuda":
            found["memory_gb"] = torch.cuda.max_memory_allocated(lit.device) / 1e9
        return found
