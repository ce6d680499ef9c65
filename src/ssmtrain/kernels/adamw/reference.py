"""AdamW in plain torch, a parameter at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ssmtrain.kernels.adamw import Moved, Rates


@torch.no_grad()
def adamw(moved: Sequence[Moved], rates: Rates) -> None:
    """See ssmtrain.kernels.adamw."""
    beta1, beta2 = rates.betas
    size = rates.lr / (1 - beta1**rates.step)
    root = math.sqrt(1 - beta2**rates.step)
    for one in moved:
        grad = one.grad * rates.scale
        one.parameter.mul_(1 - rates.lr * rates.weight_decay)
        one.exp_avg.lerp_(grad, 1 - beta1)
        one.exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        below = one.exp_avg_sq.sqrt().div_(root).add_(rates.eps)
        one.parameter.addcdiv_(one.exp_avg, below, value=-size)
        if one.copy is not None:
            one.copy.copy_(one.parameter)


def norm(grads: Sequence[Tensor]) -> Tensor:
    """See ssmtrain.kernels.adamw."""
    return torch.nn.utils.get_total_norm(list(grads))
