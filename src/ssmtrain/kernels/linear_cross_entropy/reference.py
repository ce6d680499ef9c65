"""Linear cross-entropy in pure torch: chunks of rows, gradients computed in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.matmul import mm
from ssmtrain.kernels.narrow import narrow

LOGITS = 2**24
"""Elements of logits held at a time."""
LOGITS_GPU = 2**27
"""The same on a GPU, where a product of few rows is slower than the pass over the weight's gradient."""
ROWS_GPU = 128
"""Rows of a GPU's tiles in a matrix product: chunks of a multiple leave none partly empty."""

Residual = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor | None]
"""What is done to a chunk: h (Q, D), W (V, D), labels (Q,), losses (Q,), and whether gradients are wanted.

It writes the cross-entropy of each row, 0 where the label is to be ignored, to `losses`, and returns
softmax - onehot (Q, V) in h's dtype, which is only used until the next call. Rows to be ignored must be
finite in it where their h is; the weights of rows make them zero.
"""


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
    residual = partial(_residual, float(logit_scale), ignore_index)
    rows = chunk or chunk_rows(weight.shape[0], hidden.is_cuda)
    return in_chunks(residual, rows, hidden, weight, labels, float(logit_scale), ignore_index)


def in_chunks(
    residual: Residual,
    rows: int,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """Return loss and n_valid, `rows` rows at a time; hidden (T, D), weight (V, D), labels (T,)."""
    valid = labels != ignore_index  # (T,)
    grad = torch.is_grad_enabled()
    wanted = (grad and hidden.requires_grad, grad and weight.requires_grad)
    loss = _LinearCrossEntropy.apply(
        hidden, weight, labels, valid.unsqueeze(1), scale, rows, wanted, residual
    )
    return loss, valid.sum()


def chunk_rows(vocab: int, on_gpu: bool) -> int:
    """Rows that a chunk has by default: as many as LOGITS allow, on a GPU in whole tiles if that is one."""
    rows = (LOGITS_GPU if on_gpu else LOGITS) // vocab
    if on_gpu and rows > ROWS_GPU:
        return rows - rows % ROWS_GPU
    return max(1, rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        valid: Tensor,
        scale: float,
        rows: int,
        wanted: tuple[bool, bool],
        residual: Residual,
    ) -> Tensor:
        low = matmul_dtype(hidden, weight)
        wide = torch.float64 if low == torch.float64 else torch.float32
        h, W = hidden.to(low), narrow(weight, low)
        row = valid.to(wide) * scale  # (T, 1), the derivative of the loss by a row's unscaled cross-entropy
        losses = row.new_empty(h.shape[0])
        dh = torch.empty_like(h, memory_format=torch.contiguous_format) if wanted[0] else None
        dW = None
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, h.shape[0], rows):
                part = slice(first, first + rows)
                p = residual(h[part], W, labels[part], losses[part], any(wanted))
                if p is None:
                    continue
                # Rows are weighted where they are narrow: hidden here, its gradient later.
                if dh is not None:
                    torch.mm(p, W, out=dh[part])
                if wanted[1]:
                    dW = _add_mm(dW, p.t(), (h[part] * row[part]).to(low), wide)
                del p  # else it stays while the next chunk's logits come
        if wanted[1] and dW is None:
            dW = torch.zeros_like(W, dtype=wide)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(dh, dW, row)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh, dW, row = ctx.saved_tensors
        if dh is not None:
            dh = (dh * (row * grad)).to(ctx.dtypes[0])
        if dW is not None:
            dW = (dW * grad).to(ctx.dtypes[1])
        return dh, dW, *[None] * 6


def _residual(
    scale: float, ignore_index: int, h: Tensor, W: Tensor, labels: Tensor, losses: Tensor, wanted: bool
) -> Tensor | None:
    """See Residual."""
    ignored = labels == ignore_index  # (Q,)
    targets = labels.masked_fill(ignored, 0).unsqueeze(1)  # (Q, 1)
    logits = mm(h, W.t(), losses.dtype)  # (Q, V)
    logp = torch.log_softmax(logits if scale == 1.0 else logits.mul_(scale), 1)
    del logits
    torch.neg(logp.gather(1, targets).squeeze(1).masked_fill_(ignored, 0.0), out=losses)
    if not wanted:
        return None
    p = logp.exp_()
    p.scatter_add_(1, targets, p.new_full((1, 1), -1.0).expand(p.shape[0], 1))
    return p.to(h.dtype)


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that a matmul of the two would run in: autocast's when it is on, else their common one."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and common != torch.float64:
        return torch.get_autocast_dtype(device)
    return common


def _add_mm(total: Tensor | None, a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b in `wide`, added to the total in place if there is one."""
    if total is None:
        return mm(a, b, wide)
    if a.dtype == wide:
        return total.addmm_(a, b)
    if a.is_cuda:
        return torch.addmm(total, a, b, out_dtype=wide, out=total)
    return total.add_(mm(a, b, wide))
