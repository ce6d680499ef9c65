"""A checkpoint's weights in a model: training resumes from them, generate and eval read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ssmtrain.checkpoint import store
from ssmtrain.checkpoint.exported import read_export
from ssmtrain.config.errors import UserError
from ssmtrain.config.schema import RunConfig
from ssmtrain.model.hybrid import HybridModel

SHOWN = 10
"""Tensors that are named where a checkpoint does not fit."""
EMA = "ema"
"""What weights= is to name for the moving average in place of the weights that trained."""


def wants_ema(words: Mapping[str, str]) -> bool:
    """Whether a line says weights=ema; UserError for any other text."""
    text = words.get("weights", EMA)
    if text != EMA:
        raise UserError(f"weights={text}: expected {EMA}; without it the weights are those that trained")
    return "weights" in words


def saved_weights(checkpoint: Path, ema: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by name, on the CPU, of a checkpoint or of an export's file.

    With `ema` the parameters are their moving averages; UserError where none were saved.
    """
    if checkpoint.is_file():
        if ema:
            raise UserError(f"weights={EMA}: {checkpoint} holds one set of weights, as it was exported")
        return read_export(checkpoint)
    tensors = store.load_tensors(checkpoint, "model")
    if not ema:
        return tensors
    if not store.load_state(checkpoint).get("ema"):
        raise UserError(
            f"weights={EMA}: {checkpoint} has no moving average of the weights",
            "train with ema.decay=0.999, and see ema.start for the step at which it begins",
        )
    return tensors | store.load_tensors(checkpoint, "ema")


def load_weights(checkpoint: Path, model: HybridModel, ema: bool = False, nonfinite: bool = False) -> None:
    """Copy saved parameters and buffers into the model; UserError when they do not fit it, or hold NaN or
    infinity and `nonfinite` does not allow that."""
    saved = saved_weights(checkpoint, ema)
    own = model.state_dict()
    _refuse_misfits(checkpoint, saved, own)
    if not nonfinite:
        refuse_nonfinite(checkpoint, saved)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def load_model(
    checkpoint: Path, config: RunConfig, vocab_size: int, device: torch.device, ema: bool = False
) -> HybridModel:
    """The trained model on `device` in evaluation mode; UserError when the checkpoint does not fit it."""
    with torch.device("meta"):
        model = HybridModel(config.model, vocab_size)
    model.to_empty(device=device)
    load_weights(checkpoint, model, ema, config.trainer.load_nonfinite)
    return model.eval()


def refuse_nonfinite(checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
    """UserError naming the tensors that hold NaN or infinity, how many, and where the first stands."""
    found = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor)).nonzero()
            at = f" at {bad[0].tolist()}" if tensor.ndim else ""
            found.append(f"{name}: {len(bad):,} of {tensor.numel():,} values are not finite, the first{at}")
    if found:
        raise UserError(
            f"{checkpoint} holds NaN or infinity in {len(found)} of {len(tensors)} tensors:",
            *found[:2],
            "continue from an earlier checkpoint with resume=<its folder>, or load this one as it is with "
            "trainer.load_nonfinite=true",
        )


def _refuse_misfits(checkpoint: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    missing = [f"{name} is missing" for name in own if name not in saved]
    unknown = [f"{name} is not in the model" for name in saved if name not in own]
    other = [
        f"{name} is {tuple(saved[name].shape)} {saved[name].dtype}, the model has {tuple(t.shape)} {t.dtype}"
        for name, t in own.items()
        if name in saved and (saved[name].shape != t.shape or saved[name].dtype != t.dtype)
    ]
    problems = [*missing, *unknown, *other]
    if not problems:
        return
    hints = [f"the config that it was saved with: {checkpoint.parent.parent / 'config.yaml'}"]
    if len(other) == len(problems) and all(
        saved[line.split(" ")[0]].shape == own[line.split(" ")[0]].shape for line in other
    ):
        hints = [
            "it was cast after it was saved: training keeps every parameter in float32; take the original"
        ]
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    raise UserError(
        f"{checkpoint} does not fit the model: {len(missing)} tensors are missing, {len(unknown)} are not in "
        f"the model, {len(other)} have another shape or type",
        *hints,
        details=[f"       {line}" for line in problems[:SHOWN] + more],
    )
