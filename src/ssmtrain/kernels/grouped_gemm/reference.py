"""Grouped matrix product in pure torch: a loop over experts, or torch's grouped_mm on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See ssmtrain.kernels.grouped_gemm."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight = x.to(low), weight.to(low)
    with torch.autocast(device, enabled=False):
        return _Grouped.apply(x, weight, counts.tolist())


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(x, weight)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for rows, out, w in zip(x.split(counts), y.split(counts), weight.unbind(0)):
            torch.mm(rows, w.t(), out=out)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            for rows, out, w in zip(dy.split(ctx.counts), dx.split(ctx.counts), weight.unbind(0)):
                torch.mm(rows, w, out=out)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for grads, rows, out in zip(dy.split(ctx.counts), x.split(ctx.counts), dw.unbind(0)):
                torch.mm(grads.t(), rows, out=out)
        return dx, dw, None
