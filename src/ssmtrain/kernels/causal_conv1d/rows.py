"""The convolution of whole rows, forward and backward, in pieces that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssmtrain.kernels.scratch import Scratch

CACHE = 512 * 1024
"""Bytes per thread of one piece on a CPU: the few arrays that an op touches then fit a core's cache."""


class RowConv(torch.autograd.Function):
    """silu(conv(x) + bias), or without silu, each row starting from zeros; nothing but inputs is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
        """Convolve x (B, L, C) with taps (C, K), which set the dtype of the sums; returns y like x."""
        columns = taps.t().contiguous()  # (K, C)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        buffer = Scratch(taps)
        for rows, start, stop in _pieces(x):
            halo = min(start, len(columns) - 1)
            piece, out = buffer.load("x", x[rows, start - halo : stop]), y[rows, start:stop]
            sums = out if y.dtype == taps.dtype else buffer("sums", *out.shape)
            _convolve(piece, columns, bias, halo, sums)
            if silu:
                F.silu(sums, inplace=True)
            if sums is not out:
                out.copy_(sums)
        ctx.save_for_backward(x, columns, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y: Tensor):
        """Gradients of x, taps and bias."""
        x, columns, bias = ctx.saved_tensors
        dtype, width = columns.dtype, len(columns)
        grad_x = torch.empty(x.shape, dtype=dtype, device=x.device)
        grad_columns = torch.zeros_like(columns)
        column, grad_column = columns.unbind(0), grad_columns.unbind(0)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        buffer = Scratch(columns)
        for rows, start, stop in _pieces(x):
            halo = min(start, width - 1)
            piece = buffer.load("x", x[rows, start - halo : stop])
            grad = buffer.load("grad", grad_y[rows, start:stop])
            if ctx.silu:
                sums = buffer("sums", *grad.shape)
                _convolve(piece, columns, bias, halo, sums)
                grad = torch.ops.aten.silu_backward.grad_input(grad, sums, grad_input=sums)
            if grad_bias is not None:
                grad_bias += grad.sum((0, 1))
            torch.mul(grad, column[-1], out=grad_x[rows, start:stop])
            for back in range(width):
                skip = max(back - start, 0)  # the row's first tokens have nothing so far back
                if skip >= stop - start:
                    break
                late = grad[:, skip:]
                early = piece[:, halo + skip - back : piece.shape[1] - back]
                if back:
                    grad_x[rows, start + skip - back : stop - back].addcmul_(late, column[-1 - back])
                product = torch.mul(late, early, out=buffer("product", *late.shape))
                grad_column[-1 - back].add_(product.sum((0, 1)))
        return grad_x.to(x.dtype), grad_columns.t(), grad_bias, None


def _pieces(x: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Cut x (B, L, C) into (rows, start, stop): some whole rows, or some tokens of one, in order of time."""
    batch, length, channels = x.shape
    in_cache = x.device.type == "cpu" and not torch.compiler.is_compiling()  # a compiler fuses the ops itself
    tokens = max(16, CACHE * torch.get_num_threads() // (4 * channels)) if in_cache else batch * length
    rows, span = max(1, tokens // length), min(tokens, length)
    for row in range(0, batch, rows):
        for start in range(0, length, span):
            yield slice(row, row + rows), start, min(start + span, length)


def _convolve(piece: Tensor, columns: Tensor, bias: Tensor | None, halo: int, out: Tensor) -> None:
    """Convolve piece (R, halo + T, C), of which the first `halo` tokens only precede, into out (R, T, C)."""
    torch.mul(piece[:, halo:], columns[-1], out=out)
    for back in range(1, len(columns)):
        skip = max(back - halo, 0)
        early = slice(halo + skip - back, max(piece.shape[1] - back, 0))
        out[:, skip:].addcmul_(piece[:, early], columns[-1 - back])
    if bias is not None:
        out.add_(bias)
