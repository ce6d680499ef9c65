"""Activation recomputation: a block keeps its input only and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a block, recomputed in backward (Chen et al. 2016).

    Routers return their statistics rather than add them to a buffer, so the second run counts nothing twice.
    """

    def run(x: torch.Tensor, ctx: Any, state: Any = None) -> Any:
        if not torch.is_grad_enabled():
            return forward(x, ctx, state)
        return checkpoint(forward, x, ctx, state, use_reentrant=False)

    return run
