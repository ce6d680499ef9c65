"""What `generate` and `eval` are given: a run and its newest good checkpoint, on a device, ready to use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ssmtrain.checkpoint.runs import Run, locate, open_run
from ssmtrain.checkpoint.weights import wants_ema
from ssmtrain.config.errors import UserError
from ssmtrain.config.request import Request
from ssmtrain.config.schema import RunConfig
from ssmtrain.kernels import backend


@dataclass(frozen=True)
class Opened:
    """A trained run, opened to read."""

    run: Run
    config: RunConfig
    """The run's config with the line's overrides on top."""
    checkpoint: Path
    device: torch.device
    ema: bool = False
    """Whether the line asks for the moving average of the weights."""


def open_trained(request: Request) -> Opened:
    """The run that the line names by run= or by the config= it was made from; UserError when there is none.

    Chooses the device and the kernels, and prints nothing.
    """
    from ssmtrain.config.load import load_run_config

    ema = wants_ema(request.words)
    if request.config is not None:
        config = request.config
        run = open_run(str(locate(config)[1]), config.runs_dir)
    else:
        runs_dir = next((w.partition("=")[2] for w in request.overrides if w.startswith("runs_dir=")), "runs")
        run = open_run(request.run or "", runs_dir)
        config = load_run_config(run.page, request.overrides)
    wanted = config.trainer.accelerator
    gpu = torch.cuda.is_available()
    if wanted == "gpu" and not gpu:
        raise UserError("trainer.accelerator: gpu asked for and none found", "set trainer.accelerator=cpu")
    device = torch.device("cuda" if gpu and wanted != "cpu" else "cpu")
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    try:
        backend.configure(config.trainer.kernels, device.type)
    except backend.BackendError as error:
        raise UserError(f"trainer.kernels: {error}") from None
    assert run.checkpoint is not None, "open_run returns runs that have a checkpoint"
    return Opened(run, config, run.checkpoint, device, ema)
