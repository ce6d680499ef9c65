"""What `generate` and `eval` are given: a run and its newest good checkpoint, on a device, ready to use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ssmtrain.checkpoint.runs import Run, locate, open_run
from ssmtrain.checkpoint.weights import wants_ema
from ssmtrain.config.errors import UserError
from ssmtrain.config.expect import show_value
from ssmtrain.config.identity import differences
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
    _refuse_another_model(run, config)
    wanted = config.trainer.accelerator
    gpu = torch.cuda.is_available()
    if wanted == "gpu" and not gpu:
        raise no_gpu()
    device = torch.device("cuda" if gpu and wanted != "cpu" else "cpu")
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    try:
        backend.configure(config.trainer.kernels, device.type)
    except backend.BackendError as error:
        raise UserError(f"trainer.kernels: {error}") from None
    assert run.checkpoint is not None, "open_run returns runs that have a checkpoint"
    return Opened(run, config, run.checkpoint, device, ema)


def no_gpu() -> UserError:
    """What to say when trainer.accelerator=gpu finds none."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return UserError(
        "trainer.accelerator: gpu asked for and none found"
        + (" (CUDA_VISIBLE_DEVICES hides them all)" if hidden else ""),
        "unset CUDA_VISIBLE_DEVICES, or set trainer.accelerator=cpu"
        if hidden
        else "set trainer.accelerator=cpu",
    )


def _refuse_another_model(run: Run, config: RunConfig) -> None:
    """Weights mean something in their own model and vocabulary only, though their shapes may fit others."""
    changed = differences(run.config, config)
    wrong = {
        key: pair
        for key, pair in changed.items()
        if key.startswith(("model.", "tokenizer.")) and key.rpartition(".")[2] != "chunk_size"
    }
    if wrong:
        shown = [
            f"{key}: {show_value(old)} in the run, {show_value(new)} now" for key, (old, new) in wrong.items()
        ]
        raise UserError(
            f"run {run.name} was trained with another model or tokenizer:",
            *shown[:3],
            "leave these keys as they are",
        )
