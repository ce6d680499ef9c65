"""Activation recomputation: of a whole block, which keeps its input only, or of what is cheap in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ssmtrain.layers.forget import forgetting


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block, recomputed in backward (Chen et al. 2016).

    Routers return their statistics rather than add them to a buffer, so the second run counts nothing twice.
    """

    def run(x: Any, ctx: Any, state: Any = None) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, ctx, state)
        # No layer draws random numbers, and a CUDA graph could not record the reading of generators.
        return checkpoint(forward, x, ctx, state, use_reentrant=False, preserve_rng_state=False)

    return run


def forgetful(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block whose layers recompute in backward what they say is cheap (layers/forget.py)."""

    def run(x: Any, ctx: Any, state: Any = None) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, ctx, state)
        with forgetting():
            return forward(x, ctx, state)

    return run
