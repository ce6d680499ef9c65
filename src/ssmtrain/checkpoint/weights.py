"""A checkpoint's weights in a model: training resumes from them, generate and eval read them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.exported import read_export
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.model.hybrid import HybridModel


def saved_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU, of a checkpoint or of an export's file."""
    if checkpoint.is_file():
        return read_export(checkpoint)
    return store.load_tensors(checkpoint, "model")


def load_weights(checkpoint: Path, model: HybridModel) -> None:
    """Copy saved parameters and buffers into the model; UserError when they do not fit it."""
    saved = saved_weights(checkpoint)
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in saved]
    problems += [f"{name} is not in the model" for name in saved if name not in own]
    problems += [
        f"{name} is {tuple(saved[name].shape)} {saved[name].dtype}, the model has {tuple(t.shape)} {t.dtype}"
        for name, t in own.items()
        if name in saved and (saved[name].shape != t.shape or saved[name].dtype != t.dtype)
    ]
    if problems:
        raise UserError(f"{checkpoint} does not fit the model:", *problems)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def load_model(checkpoint: Path, config: RunConfig, vocab_size: int, device: torch.device) -> HybridModel:
    """The trained model on `device` in evaluation mode; UserError when the checkpoint does not fit it."""
    with torch.device("meta"):
        model = HybridModel(config.model, vocab_size)
    model.to_empty(device=device)
    load_weights(checkpoint, model)
    return model.eval()
