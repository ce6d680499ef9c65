"""Linear cross-entropy in pure torch: chunks of rows, gradients computed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGITS = 2**24
"""Elements of logits held at a time."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    logit_scale: float,
    ignore_index: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """See ssmtrain.kernels.linear_cross_entropy."""
    valid = labels != ignore_index  # (T,)
    targets = labels.masked_fill(~valid, 0)
    rows = chunk or max(1, LOGITS // weight.shape[0])
    loss = _LinearCrossEntropy.apply(
        hidden, weight, targets, valid, float(logit_scale), rows, torch.is_grad_enabled()
    )
    return loss, valid.sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        scale: float,
        rows: int,
        grad: bool,
    ) -> Tensor:
        low = _matmul_dtype(hidden, weight)
        wide = torch.float64 if low == torch.float64 else torch.float32
        wants_hidden, wants_weight = (grad and need for need in ctx.needs_input_grad[:2])
        W = weight.to(low)
        h = hidden.to(low)
        weights = valid.to(wide)
        loss = hidden.new_zeros((), dtype=wide)
        dh = torch.empty_like(hidden, dtype=wide) if wants_hidden else None
        dW = None
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, hidden.shape[0], rows):
                part = slice(first, first + rows)
                target = targets[part].unsqueeze(1)  # (Q, 1)
                logits = _mm(h[part], W.t(), wide)  # (Q, V)
                if scale != 1.0:
                    logits.mul_(scale)
                logp = torch.log_softmax(logits, 1)
                del logits
                loss -= (logp.gather(1, target).squeeze(1) * weights[part]).sum()
                if not (wants_hidden or wants_weight):
                    continue
                # Gradient of the logits, softmax - onehot; row weights and scale go onto the narrower side.
                p = logp.exp_()
                p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
                p = p.to(low)
                row = (weights[part] * scale).unsqueeze(1)
                if dh is not None:
                    torch.mul(_mm(p, W, wide), row, out=dh[part])
                if wants_weight:
                    piece = _mm(p.t(), (h[part] * row).to(low), wide)  # (V, D)
                    dW = piece if dW is None else dW.add_(piece)
        if wants_weight and dW is None:
            dW = torch.zeros_like(weight)
        ctx.save_for_backward(
            None if dh is None else dh.to(hidden.dtype), None if dW is None else dW.to(weight.dtype)
        )
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dW = ctx.saved_tensors
        dh = None if dh is None else dh * grad.to(dh.dtype)
        dW = None if dW is None else dW * grad.to(dW.dtype)
        return dh, dW, None, None, None, None, None


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a matmul of the two would run in: autocast's when it is on, else their common one."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and common != torch.float64:
        return torch.get_autocast_dtype(device)
    return common


def _mm(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in `wide`; on the GPU a low-precision product is summed and returned in it without rounding."""
    if a.dtype == wide:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return (a @ b).to(wide)
