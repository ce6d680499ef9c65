"""RunState, the run's clock and counters, and the random generators' states as tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass
class RunState:
    """What a run knows of itself, saved with every checkpoint."""

    step: int = 0
    """Finished optimiser steps, skipped ones included: the clock of everything else."""
    tokens: int = 0
    """Tokens trained on."""
    rows: int = 0
    """Rows consumed, over all ranks: the whole state of the data."""
    nonfinite: int = 0
    """Steps skipped because the loss or the gradient was not finite."""
    nonfinite_row: int = 0
    """How many of them were the latest steps without a break."""
    window_loss: float = 0.0
    """Sum of the losses since the latest train record."""
    window_steps: int = 0
    """Number of them."""
    seconds: float = 0.0
    """Time spent in fit, over all processes that this run has had."""
    best_val: float | None = None
    """Lowest validation loss, nats per token."""
    best_step: int | None = None
    """Its step."""
    save_failures: int = 0
    """Saves that failed, in a row."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the latest steps that were taken, where trainer.spikes wants to know."""
    recent_norms: list[float] = field(default_factory=list)
    """Their gradients' norms."""
    spikes: int = 0
    """Steps left out because the loss or the gradient leapt."""
    spikes_row: int = 0
    """How many of them were the latest steps without a break."""
    rollbacks: int = 0
    """Times that the run went back to a checkpoint."""
    rollbacks_row: int = 0
    """How many of them were to the latest one."""
    micro_batch: int | None = None
    """Rows that a device takes at a time, where it was to be found out."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunState:
        """The inverse of as_dict; unknown keys are ignored, so that older programs read newer files.

        ValueError names a value that is not what as_dict writes.
        """
        if not isinstance(data, dict):
            raise ValueError("its run is not a mapping")
        kept = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for f in fields(cls):
            if f.name not in kept:
                continue
            value, kinds = kept[f.name], str(f.type)
            if kinds == "list[float]":
                if not isinstance(value, list) or any(type(v) is not float for v in value):
                    raise ValueError(f"its run.{f.name} is {str(value)[:40]!r}, expected {kinds}")
                continue
            number = (type(value) is int and value >= 0) or (type(value) is float and "float" in kinds)
            if not number and not (value is None and "None" in kinds):
                raise ValueError(f"its run.{f.name} is {str(value)[:40]!r}, expected {kinds}")
        return cls(**kept)


def seed_generators(seed: int, rank: int, step: int) -> None:
    """Seed torch, numpy and python from (seed, rank, step): a new run, or a rank new to a checkpoint."""
    mixed = np.random.SeedSequence([seed, rank, step]).generate_state(2, np.uint64)
    torch.manual_seed(int(mixed[0] >> np.uint64(1)))
    np.random.seed(int(mixed[1] & np.uint64(0xFFFFFFFF)))
    random.seed(int(mixed[1]))


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """This process's generator states as tensors: torch, numpy, python, and the GPU's where there is one."""
    numpy_state: Any = np.random.get_state(legacy=True)
    _, python_words, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(numpy_state[1].astype(np.int64)),
        "numpy_rest": torch.tensor([numpy_state[2], numpy_state[3], numpy_state[4]], dtype=torch.float64),
        "python": torch.tensor(python_words, dtype=torch.int64),
        "python_rest": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_tensors(states: dict[str, Tensor], device: torch.device) -> None:
    """Put generator states back; a GPU's state is ignored on a CPU."""
    torch.set_rng_state(states["torch"])
    position, has_gauss, gauss = states["numpy_rest"].tolist()
    words = states["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), gauss))
    has_left, left = states["python_rest"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), left if has_left else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


@contextmanager
def forked_rng(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Run the body under generators of its own: what it draws changes nothing outside."""
    before = rng_tensors(device)
    try:
        if seed is not None:
            seed_generators(seed, 0, 0)
        yield
    finally:
        set_rng_tensors(before, device)
