"""Linear cross-entropy in pure torch: chunks of rows, gradients computed in the forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOGITS = 2**24
"""Elements of logits held at a time."""
LOGITS_GPU = 2**26
"""The same on a GPU, where a product of few rows is slower than the pass over the weight's gradient."""


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
    targets = labels.masked_fill(~valid, 0).unsqueeze(1)  # (T, 1)
    rows = chunk or max(1, (LOGITS_GPU if hidden.is_cuda else LOGITS) // weight.shape[0])
    grad = torch.is_grad_enabled()
    loss = _LinearCrossEntropy.apply(
        hidden,
        weight,
        targets,
        valid.unsqueeze(1),
        float(logit_scale),
        rows,
        (grad and hidden.requires_grad, grad and weight.requires_grad),
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
        wanted: tuple[bool, bool],
    ) -> Tensor:
        low = _matmul_dtype(hidden, weight)
        wide = torch.float64 if low == torch.float64 else torch.float32
        h, W = hidden.to(low), weight.to(low)
        row = valid.to(wide) * scale  # (T, 1), the derivative of the loss by a row's unscaled cross-entropy
        loss = row.new_zeros(())
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted[0] else None
        dW = torch.zeros_like(W, dtype=wide) if wanted[1] else None
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, h.shape[0], rows):
                part = slice(first, first + rows)
                logits = _mm(h[part], W.t(), wide)  # (Q, V)
                logp = torch.log_softmax(logits if scale == 1.0 else logits.mul_(scale), 1)
                del logits
                loss -= logp.gather(1, targets[part]).masked_fill_(~valid[part], 0.0).sum()
                if dh is None and dW is None:
                    continue
                # softmax - onehot. Rows are weighted where they are narrow: hidden here, its gradient later.
                p = logp.exp_()
                p.scatter_add_(1, targets[part], p.new_full((1, 1), -1.0).expand(p.shape[0], 1))
                p = p.to(low)
                if dh is not None:
                    torch.mm(p, W, out=dh[part])
                if dW is not None:
                    _add_mm(dW, p.t(), (h[part] * row[part]).to(low))
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(dh, dW, row)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dW, row = ctx.saved_tensors
        if dh is not None:
            dh = (dh * (row * grad)).to(ctx.dtypes[0])
        if dW is not None:
            dW = (dW * grad).to(ctx.dtypes[1])
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


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _mm(a, b, total.dtype)
