"""What is done to a built model before it trains: compile, then recompute; the strategy wraps it last.

A block that is recomputed runs as a whole, compiled or not, twice: the compiler sees no checkpoint, which not
every version of it takes with all that a block holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ssmtrain.config.trainer import TrainerConfig
from ssmtrain.layers.norm import Stream
from ssmtrain.model.hybrid import HybridModel
from ssmtrain.parallel.recompute import forgetful, recomputed


def apply(model: HybridModel, trainer: TrainerConfig) -> HybridModel:
    """Apply the trainer's options to every block, in place; names and parameters stay as they are."""
    for block in model.blocks:
        apply_to(block, trainer, model.multiplier)
    return model


def apply_to(block: nn.Module, trainer: TrainerConfig, multiplier: float) -> None:
    """Apply the trainer's options to a Block, in place; `multiplier` is of what its stream's branch adds."""
    if trainer.compile:
        _set_forward(block, compiled(block.forward, block.prepare))  # type: ignore[arg-type]  # a Block's
    elif trainer.recompute == "ops":
        _set_forward(block, forgetful(block.forward))
    if trainer.recompute == "block":
        _set_forward(block, added_first(recomputed(block.forward), multiplier))


def added_first(forward: Callable[..., Any], scale: float) -> Callable[..., Any]:
    """The forward of a block that keeps its input: the stream, added up, is one tensor rather than two."""

    def run(stream: Stream, ctx: Any, state: Any = None) -> Any:
        return forward(Stream(stream.total(scale)), ctx, state)

    return run


def compiled(forward: Callable[..., Any], prepare: Callable[[Stream, Any], None]) -> Callable[..., Any]:
    """The forward under torch.compile while training, as it was while scoring and decoding.

    Sampling runs at a new length with every token, and health probes carry states: compiling those would take
    longer than running them.
    """
    fast = torch.compile(forward)

    def run(stream: Stream, ctx: Any, state: Any = None) -> Any:
        if torch.is_grad_enabled() and ctx.states is None:
            prepare(stream, ctx)
            return fast(stream, ctx, state)
        return forward(stream, ctx, state)

    return run


def _set_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    # An instance attribute shadows the class's method, so a block keeps its name, hooks and state dict.
    object.__setattr__(block, "forward", forward)
