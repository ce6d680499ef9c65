"""What is done to one rank from inside, at its start: by name, so that it reaches a process of its own."""

from __future__ import annotations

import dataclasses
import errno
import os
import time
from pathlib import Path
from typing import Any

from ssmtrain.checkpoint import cut
from ssmtrain.train import pace
from ssmtrain.train.module import LitLM

NAN = float("nan")


def loss_of_nan(step: int) -> None:
    """The loss of the step after so many is NaN here."""
    real = LitLM.run_model

    def run_model(self: LitLM, batch: Any) -> Any:
        out = real(self, batch)
        if self.model.training and self.state.step == step and out.loss_sum is not None:
            return dataclasses.replace(out, loss_sum=out.loss_sum * NAN)
        return out

    LitLM.run_model = run_model  # type: ignore[method-assign]


def steep_rows(rows: list[int], factor: float) -> None:
    """The loss of a micro-batch that has one of these rows is so many times what it is."""
    real = LitLM.run_model

    def run_model(self: LitLM, batch: Any) -> Any:
        out = real(self, batch)
        if self.model.training and set(rows) & set(batch.sample_ids) and out.loss_sum is not None:
            return dataclasses.replace(out, loss_sum=out.loss_sum * factor)
        return out

    LitLM.run_model = run_model  # type: ignore[method-assign]


def hang_reading(step: int) -> None:
    """The rows of the step after so many never come."""
    real = LitLM.rows

    def rows(self: LitLM) -> Any:
        while self.state.step == step:
            time.sleep(1)
        return real(self)

    LitLM.rows = rows  # type: ignore[method-assign]


def slow_passes(seconds: float) -> None:
    """Every forward pass takes so much longer."""
    real = LitLM.run_model

    def run_model(self: LitLM, batch: Any) -> Any:
        time.sleep(seconds)
        return real(self, batch)

    LitLM.run_model = run_model  # type: ignore[method-assign]


def called_slow_after(steps: int) -> None:
    """A slow rank is told of after so many steps."""
    pace.STEPS = steps


def disk_full(times: int) -> None:
    """The disk refuses this rank's part of so many checkpoints."""
    real, left = cut.write_parts, [times]

    def write_parts(path: Path, parts: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, parts)

    cut.write_parts = write_parts


def weighed(file: str) -> None:
    """Note (step, resident bytes, open files, threads) before every step."""
    real = LitLM.training_step

    def training_step(self: LitLM, batch: Any, batch_idx: int) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        counts = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        with open(file, "a") as log:
            print(self.state.step, pages * os.sysconf("SC_PAGE_SIZE"), *counts, file=log)
        return real(self, batch, batch_idx)

    LitLM.training_step = training_step  # type: ignore[method-assign]


def first_contact(seconds: float) -> None:
    """A logging service gets so long to answer."""
    from ssmtrain.train.callbacks import wandb_log

    wandb_log.INIT_TIMEOUT = seconds
