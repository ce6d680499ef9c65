"""Grouped matrix product in torch: a loop over experts, or torch's grouped_mm where the GPU has it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """See ssmtrain.kernels.grouped_gemm."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        low = torch.get_autocast_dtype(device)
        x, weight = x.to(low), weight.to(low)
    with torch.autocast(device, enabled=False):
        if _native(x, weight):
            ends = counts.cumsum(0).to(torch.int32)
            return F.grouped_mm(x.contiguous(), weight.transpose(1, 2), offs=ends)  # (T, Dout)
        return _Loop.apply(x, weight, counts.tolist())


def _native(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: bf16 on the GPU, at least one row, rows of whole 16 bytes."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        and x.shape[0] > 0
        and weight.shape[1] % 8 == weight.shape[2] % 8 == 0
    )


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        ctx.save_for_backward(x, weight)
        y = x.new_empty(x.shape[0], weight.shape[1])
        for rows, out, w in zip(x.split(counts), y.split(counts), weight.unbind(0)):
            torch.mm(rows, w.t(), out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dys = dy.split(ctx.counts)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x, memory_format=torch.contiguous_format)
            for grad, out, w in zip(dys, dx.split(ctx.counts), weight.unbind(0)):
                torch.mm(grad, w, out=out)
        if ctx.needs_input_grad[1]:
            # An expert without rows gets the product over none: zeros.
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for grad, rows, out in zip(dys, x.split(ctx.counts), dw.unbind(0)):
                torch.mm(grad.t(), rows, out=out)
        return dx, dw, None
